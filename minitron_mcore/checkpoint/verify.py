"""A checkpoint just imported, against transformers' own model of its source: the same ids in, the same logits out.

Legend: s sequence, b batch (1), V vocabulary. Both in fp32, whatever is stored.
"""

from __future__ import annotations

from pathlib import Path

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.errors import InputError
from minitron_mcore.model.gpt import build_model, unwrap
from minitron_mcore.model.microbatch import Microbatch, on_this_context_rank
from minitron_mcore.model.schedule import final_hidden_states
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import context_group, context_part, tensor_group
from minitron_mcore.runtime.libraries import MODEL_AS_DATA, imported
from minitron_mcore.runtime.start import Runtime

# The same products, summed in another order, differ by about 1e-6 of the largest logit after a few layers, and by about
# 1e-5 after a hundred; a head in the wrong place or a wrong rotary frequency makes 1e-2 or more.
TOLERANCE = 1e-4
SEQUENCES, LENGTH, SEED = 4, 32, 1234


def compare_with_transformers(
    source: Path, folder: Path, architecture: Architecture, parallel: ParallelConfig, runtime: Runtime
) -> float:
    """Largest |difference| of the logits / largest |logit|, of iteration 0 of `folder` against the folder `source`.

    Every rank calls, after `use_layout(parallel)`, and gets the same number; each loads its shard in fp32, the first
    one also transformers' whole model. Raises InputError above TOLERANCE, or where transformers cannot load `source`.
    """
    # As many microbatches as interleaved stages need, each of as many tokens as the layout divides.
    count = -(-SEQUENCES // parallel.pipeline) * parallel.pipeline
    parts = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    length = -(-min(LENGTH, architecture.max_position_embeddings) // parts) * parts
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, architecture.vocab_size, (count, 1, length), generator=generator)
    expected = runtime.on_main(lambda: _reference_logits(source, ids))

    chunks = as_chunks(build_model(architecture, parallel, "fp32", trainable=False))
    load_weights(folder, 0, chunks, architecture)
    positions = torch.arange(length).expand(1, length).contiguous()
    batch = [on_this_context_rank(Microbatch.unlabelled(tokens, positions)).to(runtime.device) for tokens in ids]
    place = context_group().rank(), parallel.context
    theirs_here = context_part(expected, 2, *place)  # [microbatch, b, s, V]
    largest = torch.zeros(1, dtype=torch.float64)
    for sequence, hidden in enumerate(final_hidden_states(chunks, batch)):
        with torch.no_grad():
            mine = unwrap(chunks[-1]).logits(hidden).cpu().transpose(0, 1)  # [b, s, V / tensor]
        first = tensor_group().rank() * mine.shape[-1]
        theirs = theirs_here[sequence][..., first : first + mine.shape[-1]]
        if theirs.numel():  # a rank's part of the vocabulary may be padding alone
            difference = (mine[..., : theirs.shape[-1]] - theirs).abs().max()
            largest = torch.maximum(largest, difference.double().nan_to_num(torch.inf))
    largest = largest.to(runtime.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    error = float(largest) / float(expected.abs().max())
    if not error <= TOLERANCE:
        much = f"{error:.1e} of the largest, more than {TOLERANCE:.0e}"
        rule = f"was imported wrongly: the logits differ from transformers' by {much}"
        raise InputError("hf", source, rule, "nothing is kept; please report it")
    return error


def _reference_logits(source: Path, ids: torch.Tensor) -> torch.Tensor:
    """[microbatch, b, s, V], fp32, on the host, from `ids` [microbatch, b, s]."""
    transformers = imported("transformers")
    try:
        automatic = transformers.AutoModelForCausalLM
        model = automatic.from_pretrained(source, dtype=torch.float32, **MODEL_AS_DATA).eval()
    except Exception as error:  # transformers raises whatever it met
        rule = f"cannot be loaded by transformers: {' '.join(str(error).split())}"
        raise InputError("hf", source, rule) from error
    with torch.no_grad():
        return torch.stack([model(tokens).logits for tokens in ids])
