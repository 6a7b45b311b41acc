"""Flags of Megatron-LM, Megatron-Bridge and NeMo, and what stands for them here. Pure."""

from __future__ import annotations

_TOKENS = "train.tokens: iterations x global_batch_size x data.sequence_length"
_ALWAYS = "no key: it is always so here"

# Sections of NeMo's configurations that are none here.
SECTIONS = ("trainer", "optim", "sched", "exp_manager", "checkpoint_config", "args")
# A flag without dashes, `_` for `-` -> the key, or several, or what is there instead (what holds a colon). A flag that
# has its key's name needs no row, unless keys of other sections have it too.
NAMES = {
    # Layout.
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "num_virtual_stages_per_pipeline_rank": "parallel.virtual_pipeline",
    "num_layers_per_virtual_pipeline_stage": "parallel.virtual_pipeline: chunks a stage, not layers a chunk",
    "context_parallel_size": "parallel.context",
    "sequence_parallel": "parallel.sequence",
    "expert_model_parallel_size": "no key: experts are not supported",
    "num_experts": "no key: experts are not supported",
    "data_parallel_size": "no key: data parallelism takes what parallel.* leaves of the ranks",
    "devices": "no key: the launcher's, as in torchrun --nproc-per-node 8",
    "num_nodes": "no key: the launcher's, as in torchrun --nnodes 2",
    # Budget and batches.
    "train_iters": _TOKENS,
    "train_samples": "train.tokens: samples x data.sequence_length",
    "max_steps": _TOKENS,
    "max_epochs": _TOKENS,
    "exit_interval": _TOKENS,
    "micro_batch_size": "train.micro_batch_size",
    "accumulate_grad_batches": "train.global_batch_size: with train.micro_batch_size it gives the accumulation",
    "gradient_accumulation_steps": "train.global_batch_size: with train.micro_batch_size it gives the accumulation",
    # Learning rate and optimizer.
    "learning_rate": "train.lr",
    "lr_decay_iters": "no key: the learning rate decays over train.tokens",
    "lr_decay_samples": "no key: the learning rate decays over train.tokens",
    "lr_warmup_fraction": "train.lr_warmup_tokens: the fraction x train.tokens",
    "lr_warmup_samples": "train.lr_warmup_tokens: samples x data.sequence_length",
    "warmup_steps": "train.lr_warmup_iters",
    "lr_wsd_decay_iters": "train.lr_wsd_decay_tokens: iterations x global_batch_size x data.sequence_length",
    "lr_wsd_decay_samples": "train.lr_wsd_decay_tokens: samples x data.sequence_length",
    "gradient_clip_val": "train.clip_grad",
    "optimizer": "no key: Adam is the optimizer",
    "use_distributed_optimizer": _ALWAYS,
    "overlap_grad_reduce": _ALWAYS,
    # Precision and memory.
    "bf16": "precision: bf16",
    "fp16": "precision: fp32 or bf16",
    "fp8_format": "teacher.precision: fp8, of the teacher alone",
    "params_dtype": "precision",
    "recompute_activations": "train.recompute_granularity: selective",
    "activations_checkpoint_granularity": "train.recompute_granularity",
    "activations_checkpoint_method": "train.recompute_method",
    "activations_checkpoint_num_layers": "train.recompute_num_layers",
    # Data and tokenizer.
    "seq_length": "data.sequence_length",
    "encoder_seq_length": "data.sequence_length",
    "data_path": "data.train",
    "data_prefix": "data.train",
    "train_data_path": "data.train",
    "valid_data_path": "data.valid",
    "splits_string": "data.split",
    "data_cache_path": "data.cache_path",
    "tokenizer_type": "tokenizer.type",
    "tokenizer_model": "tokenizer.model",
    "vocab_size": "model.vocab_size",
    "vocab_file": "tokenizer.model",
    "merge_file": "tokenizer.model: the folder that holds it",
    # Checkpoints, validation and logs.
    "save": "train.checkpoint",
    "pretrained_checkpoint": "train.load",
    "restore_from_path": "train.load",
    "resume_from_checkpoint": "train.checkpoint: a run resumes from the folder that it writes",
    "ckpt_format": _ALWAYS + ", torch_dist",
    "val_check_interval": "train.eval_interval",
    "limit_val_batches": "train.eval_iters",
    "log_interval": "log.interval",
    "log_every_n_steps": "log.interval",
    "tensorboard_dir": "log.tensorboard: true or false; the files lie in the run's folder",
    "wandb_exp_name": "name",
    "wandb_save_dir": "no key: the files lie in the run's folder",
    # Model.
    "group_query_attention": "model.num_query_groups: the number of groups alone",
    "norm_epsilon": "model.layernorm_epsilon",
    "swiglu": "model.family: it decides about activation, norm and biases",
    "normalization": "model.family: it decides about activation, norm and biases",
    "disable_bias_linear": "model.family: it decides about activation, norm and biases",
    # Distillation, pruning and conversion.
    "kd_teacher_load": "teacher.checkpoint",
    "teacher_model_path": "teacher.checkpoint",
    "kd_distill_cfg": "distill: the section of keys",
    "export_kd_teacher_load": "teacher.checkpoint",
    "logit_kl_temperature": "distill.temperature",
    "kd_loss_scale": "distill.kd_weight",
    "target_num_layers": "student.num_layers",
    "target_hidden_size": "student.hidden_size",
    "target_ffn_hidden_size": "student.ffn_hidden_size",
    "target_num_attention_heads": "student.num_attention_heads",
    "target_num_query_groups": "student.num_query_groups",
    "drop_layers": "student.layers: the layers that stay",
    "num_train_samples": "importance.num_samples",
    "calib_size": "importance.num_samples",
    "hf_model": "hf",
    "hf_model_path": "hf",
    "megatron_path": "checkpoint",
}


def named_here(flag: str) -> str:
    """What to write for a flag, as --train-iters or trainer.max_steps, in words; "" where it is none of them."""
    path = flag.lstrip("-").partition("=")[0].replace("-", "_")
    section, _, leaf = path.rpartition(".")
    key, _, how = NAMES.get(leaf, "").partition(": ")
    if key in ("", "no key"):
        return how
    words = f"write {key}" + (f" ({how})" if how else "")
    return words.replace("train.", f"{section}.") if section in ("correct", "distill") else words
