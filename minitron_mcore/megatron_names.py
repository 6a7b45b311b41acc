"""Flags of Megatron-LM, Megatron-Bridge and NeMo, and what stands for them here. Pure."""

from __future__ import annotations

_ITERATIONS = "train.tokens: iterations x global_batch_size x data.sequence_length"
_ACCUMULATION = "train.global_batch_size: with train.micro_batch_size it gives the accumulation"

# Sections of NeMo's configurations that are none here.
SECTIONS = ("trainer", "optim", "sched", "exp_manager", "checkpoint_config", "args")
# A key, or what is there instead (what holds a colon) -> the flags that it stands for, without dashes, `_` for `-`. A
# flag that has its key's name needs no row, unless keys of other sections have it too.
FLAGS = {
    # Layout.
    "parallel.tensor": "tensor_model_parallel_size",
    "parallel.pipeline": "pipeline_model_parallel_size",
    "parallel.virtual_pipeline": "virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank",
    "parallel.virtual_pipeline: chunks a stage, not layers a chunk": "num_layers_per_virtual_pipeline_stage",
    "parallel.context": "context_parallel_size",
    "parallel.sequence": "sequence_parallel",
    "no key: experts are not supported": "expert_model_parallel_size num_experts",
    "no key: data parallelism takes what parallel.* leaves of the ranks": "data_parallel_size",
    "no key: the launcher's, as in torchrun --nproc-per-node 8": "devices",
    "no key: the launcher's, as in torchrun --nnodes 2": "num_nodes",
    # Budget and batches.
    _ITERATIONS: "train_iters max_steps max_epochs exit_interval",
    "train.tokens: samples x data.sequence_length": "train_samples",
    "train.micro_batch_size": "micro_batch_size",
    _ACCUMULATION: "accumulate_grad_batches gradient_accumulation_steps",
    # Learning rate and optimizer.
    "train.lr": "learning_rate",
    "no key: the learning rate decays over train.tokens": "lr_decay_iters lr_decay_samples",
    "train.lr_warmup_tokens: the fraction x train.tokens": "lr_warmup_fraction",
    "train.lr_warmup_tokens: samples x data.sequence_length": "lr_warmup_samples",
    "train.lr_warmup_iters": "warmup_steps",
    "train.lr_wsd_decay_tokens: iterations x global_batch_size x data.sequence_length": "lr_wsd_decay_iters",
    "train.lr_wsd_decay_tokens: samples x data.sequence_length": "lr_wsd_decay_samples",
    "train.clip_grad": "gradient_clip_val",
    "no key: Adam is the optimizer": "optimizer",
    "no key: it is always so here": "use_distributed_optimizer",
    "no key: it is so where they are overlapped": "align_grad_reduce align_param_gather",
    "train.overlap_param_gather: from the step on": "overlap_param_gather_with_optimizer_step",
    "train.ddp_bucket_size: parameters of a bucket": "ddp_num_buckets",
    # Precision and memory.
    "precision: bf16": "bf16",
    "precision: fp32 or bf16": "fp16",
    "no key: main weights are cut over the ranks, and bf16 ones gathered": "fp8_param_gather fp8_param",
    "no key: gradients are fp32, as the loss adds the output head's to them": "main_grads_dtype",
    "no key: the largest of 1,024 steps, with fp8_recipe=delayed": "fp8_amax_history_len fp8_amax_compute_algo",
    "precision": "params_dtype",
    "train.fp8_format": "fp8 fp8_hybrid fp8_e4m3",
    "train.recompute_granularity: selective": "recompute_activations",
    "train.recompute_granularity": "activations_checkpoint_granularity",
    "train.recompute_method": "activations_checkpoint_method",
    "train.recompute_num_layers": "activations_checkpoint_num_layers",
    # Data and tokenizer.
    "data.sequence_length": "seq_length encoder_seq_length",
    "data.train": "data_path data_prefix train_data_path",
    "data.valid": "valid_data_path",
    "data.split": "splits_string",
    "data.cache_path": "data_cache_path",
    "tokenizer.type": "tokenizer_type",
    "tokenizer.model": "tokenizer_model vocab_file",
    "model.vocab_size": "vocab_size",
    "tokenizer.model: the folder that holds it": "merge_file",
    # Checkpoints, validation and logs.
    "train.checkpoint": "save",
    "train.load": "pretrained_checkpoint restore_from_path",
    "train.checkpoint: a run resumes from the folder that it writes": "resume_from_checkpoint",
    "no key: it is always so here, torch_dist": "ckpt_format",
    "train.eval_interval": "val_check_interval",
    "train.eval_iters": "limit_val_batches",
    "log.interval": "log_interval log_every_n_steps",
    "log.tensorboard: true or false; the files lie in the run's folder": "tensorboard_dir",
    "name": "wandb_exp_name",
    "no key: the files lie in the run's folder": "wandb_save_dir",
    # Model.
    "model.num_query_groups: the number of groups alone": "group_query_attention",
    "model.layernorm_epsilon": "norm_epsilon",
    "model.family: it decides about activation, norm and biases": "swiglu normalization disable_bias_linear",
    # Distillation, pruning and conversion.
    "teacher.checkpoint": "kd_teacher_load teacher_model_path export_kd_teacher_load",
    "distill: the section of keys": "kd_distill_cfg",
    "distill.temperature": "logit_kl_temperature",
    "distill.kd_weight": "kd_loss_scale",
    "student.num_layers": "target_num_layers",
    "student.hidden_size": "target_hidden_size",
    "student.ffn_hidden_size": "target_ffn_hidden_size",
    "student.num_attention_heads": "target_num_attention_heads",
    "student.num_query_groups": "target_num_query_groups",
    "student.layers: the layers that stay": "drop_layers",
    "importance.num_samples": "num_train_samples calib_size",
    "hf": "hf_model hf_model_path",
    "checkpoint": "megatron_path",
}
NAMES = {flag: words for words, flags in FLAGS.items() for flag in flags.split()}


def named_here(flag: str) -> str:
    """What to write for a flag, as --train-iters or trainer.max_steps, in words; "" where it is none of them."""
    path = flag.lstrip("-").partition("=")[0].replace("-", "_")
    section, _, leaf = path.rpartition(".")
    key, _, how = NAMES.get(leaf, "").partition(": ")
    if key in ("", "no key"):
        return how
    words = f"write {key}" + (f" ({how})" if how else "")
    return words.replace("train.", f"{section}.") if section in ("correct", "distill") else words
