"""Architecture -> Megatron's GPTModel on this rank.

Legend: s sequence (its tensor-parallel part under sequence parallelism), b batch, h hidden.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_mcore.architecture import Architecture, RopeScaling
from minitron_mcore.errors import InputError
from minitron_mcore.layout import check_tensor_parallel, checkpoint_key, parameter_table, split_layers
from minitron_mcore.model.embedding import Embedding
from minitron_mcore.model.fp8 import OF_TEACHER, Fp8
from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from minitron_mcore.model.specs import HAVE_TE, block_submodules, rotary_fields
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.cpu_adapter import transformer_fields
from minitron_mcore.runtime.repairs import pipeline_communication


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Nemotron's activation. Megatron's own is compiled, which costs seconds at the first call on CPU."""
    return torch.nn.functional.relu(x).square()


ACTIVATIONS = {"silu": torch.nn.functional.silu, "squared_relu": squared_relu}
# An architecture's fields as Megatron's config takes them, under the same names.
SHARED_FIELDS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "qk_layernorm", "gated_linear_unit"),
    *("add_qkv_bias", "init_method_std"),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LanguageModel(GPTModel):
    """GPTModel whose last stage gives the final (normed) hidden states [s, b, h], not logits.

    Every loss of this project starts from hidden states (distillation/logits/loss.py), so full logits never exist.
    Call `logits` where a user wants them.
    """

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """This rank's shard of the output head [V / TP, h]; the embedding's where they are tied. Last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Final hidden states [s, b, h] -> this rank's logits [s, b, V / TP]. Last stage only."""
        return self.output_layer(hidden_states, weight=self.head_weight())[0]


def transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    precision: str,
    *,
    bare_layers: bool = False,
    recompute: Recompute = KEEP_ALL,
    tp_comm_overlap: bool = False,
    fp8: Fp8 | None = None,
) -> TransformerConfig:
    """Megatron's config of `architecture` under `parallel`. Raises InputError for a layout that cannot hold it.

    precision: fp32, bf16, or fp8: bf16 with the products of all layers in fp8, as `OF_TEACHER` has it.
    bare_layers: their weights are kept elsewhere. fp8: which products of a bf16 model are in fp8.
    tp_comm_overlap: as `build_model`.
    """
    a = architecture
    check_tensor_parallel(a, parallel.tensor)
    if precision == "fp8":
        precision, fp8 = "bf16", OF_TEACHER
    if fp8 is not None and not HAVE_TE:
        remedy = "`python -c 'import transformer_engine.pytorch'` says why"
        raise InputError("", "fp8", "needs Transformer Engine, which cannot be imported here", remedy)
    dtype = DTYPES[precision]
    stages = split_layers(a.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    return TransformerConfig(
        **{name: getattr(a, name) for name in SHARED_FIELDS},
        activation_func=ACTIVATIONS[a.activation],
        use_te_activation_func=a.gated_linear_unit and a.activation == "silu",  # in name: model/specs.py
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        tp_comm_overlap=tp_comm_overlap,
        pipeline_model_parallel_layout=_uneven_layout(stages, parallel),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Else Transformer Engine keeps a quantised copy of every layer's weights from a pass's first microbatch on,
        # whoever keeps the weights themselves.
        disable_parameter_transpose_cache=bare_layers,
        calculate_per_token_loss=True,
        persist_layer_norm=False,
        **(fp8.megatron_fields() if fp8 else {}),
        **recompute.megatron_fields(),
        **pipeline_communication(parallel.virtual_pipeline),
        **transformer_fields(),
        **rotary_fields(),
    )


def layout_of(config: TransformerConfig) -> ParallelConfig:
    """The layout that a model's config was made for."""
    sizes = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size
    return ParallelConfig(*sizes, virtual, config.context_parallel_size, config.sequence_parallel)


def _uneven_layout(stages: list[list[list[int]]], parallel: ParallelConfig) -> list[list[str]] | None:
    """Megatron's explicit layout, where the layers do not divide by the stages; None where they do."""
    # In the model's order: chunk after chunk, each over all the stages.
    counts = [len(stage[chunk]) for chunk in range(parallel.virtual_pipeline or 1) for stage in stages]
    if len(set(counts)) == 1:
        return None
    rows = [["decoder"] * count for count in counts]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return rows


class _StageLayout(PipelineParallelLayerLayout):
    """An uneven layout for a model with process groups of its own.

    Megatron's version asks the global groups, which belong to another model.
    """

    def __init__(self, layout: list[list[str]], pipeline: int, stage: int) -> None:
        super().__init__(layout, pipeline)
        self.stage = stage

    def get_num_layers_to_build(self, layer_type: Any = LayerType.decoder, vp_stage: Any = None, pp_rank: Any = None):  # type: ignore[no-untyped-def]
        return self.layout[self.stage][vp_stage or 0].count(layer_type)

    def get_layer_offset(self, layer_type: Any = LayerType.decoder, vp_stage: Any = None, pp_rank: Any = None):  # type: ignore[no-untyped-def]
        chunk = vp_stage or 0
        before = [stage[index] for index in range(chunk) for stage in self.layout]
        before += [stage[chunk] for stage in self.layout[: self.stage]]
        return sum(part.count(layer_type) for part in before)


def build_model(
    architecture: Architecture,
    parallel: ParallelConfig,
    precision: str,
    *,
    trainable: bool = True,
    groups: ProcessGroupCollection | None = None,
    bare_layers: bool = False,
    recompute: Recompute = KEEP_ALL,
    tp_comm_overlap: bool = False,
    fp8: Fp8 | None = None,
) -> list[LanguageModel]:
    """This rank's chunks of the model (one, or one a virtual stage), with memory for the weights but no values.

    Every rank calls, after `use_layout(parallel)`, or with the `groups` of another layout that `parallel` describes.
    Fill it with `initialize` or a checkpoint. `bare_layers`: layers have no memory for their weights either, which
    are kept elsewhere (distillation/teacher/placement.py). `recompute`: what backward computes again.
    `tp_comm_overlap`: layers exchange states through Transformer Engine's user buffers (runtime/user_buffers.py), which
    must be there whenever the model runs.
    `fp8`: which products are in fp8.
    """
    how: dict[str, Any] = {"bare_layers": bare_layers, "recompute": recompute, "fp8": fp8}
    config = transformer_config(architecture, parallel, precision, **how, tp_comm_overlap=tp_comm_overlap)
    groups = groups or ProcessGroupCollection.use_mpu_process_groups()
    stage = groups.pp.rank()
    if config.pipeline_model_parallel_layout is not None:
        layout: Any = config.pipeline_model_parallel_layout
        config.pipeline_model_parallel_layout = _StageLayout(layout.input_data, parallel.pipeline, stage)
    chunks = []
    for chunk in range(parallel.virtual_pipeline or 1):
        vp_stage = chunk if parallel.virtual_pipeline else None
        model = LanguageModel(
            config=config,
            transformer_layer_spec=block_submodules(config, vp_stage, stage, bare_layers=bare_layers),
            vocab_size=architecture.padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=stage == 0 and chunk == 0,
            post_process=stage == parallel.pipeline - 1 and chunk == (parallel.virtual_pipeline or 1) - 1,
            share_embeddings_and_output_weights=not architecture.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_percent=architecture.rotary_percent,
            rotary_base=architecture.rotary_base,  # type: ignore[arg-type]
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if model.pre_process:
            model.embedding.word_embeddings.__class__ = Embedding
        if architecture.rope_scaling is not None:
            rope = model.rotary_pos_emb
            rope.inv_freq = scale_frequencies(rope.inv_freq, architecture.rope_scaling)
        mark_tensor_parallel(model, architecture)
        if not trainable:
            model.requires_grad_(False).eval()
        chunks.append(model)
    return chunks


def mark_tensor_parallel(model: LanguageModel, architecture: Architecture) -> None:
    """Tell Megatron which parameters are shards: its gradient norm counts an unmarked one on the first rank alone.

    Megatron marks them while it initialises them, which is not done here (`perform_initialization=False`).
    """
    axes = {parameter.key: parameter.shard_axis for parameter in parameter_table(architecture)}
    axes.setdefault("output_layer.weight", 0)
    for name, tensor in model.named_parameters():
        axis = axes[checkpoint_key(name)[0]]
        if axis is not None and not getattr(tensor, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(tensor, is_parallel=True, dim=axis, stride=1)


def scale_frequencies(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama-3.1's scaling of the rotary frequencies [rotary dim / 2] (Megatron fixes three of its four numbers).

    Wavelengths beyond original / low are divided by `factor`, those below original / high are kept, and between the
    two the result runs linearly in original / wavelength.
    """
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_max_position_embeddings / wavelength
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return inv_freq * kept + inv_freq / scaling.factor * (1 - kept)


def unwrap(model: torch.nn.Module) -> LanguageModel:
    """The LanguageModel inside Megatron's DDP wrapper."""
    while not isinstance(model, LanguageModel):
        model = model.module  # type: ignore[assignment]
    return model
