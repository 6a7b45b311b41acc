"""Seconds of what a rank computes and communicates for one microbatch: a layer, the embedding, the loss. Pure.

Each matrix product is the longer of its operations and its bytes (rates.py). What lies between products is bound by
memory: its bytes are counted operation by operation, those of the fused kernels where there are such, and of torch's
elementwise ones on the CPU.

Legend: n tokens of a microbatch on a rank, T tensor-parallel size, h hidden, f ffn, q and k widths of all query heads
and of all key-value groups, V padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.distillation.config import default_chunk_tokens
from minitron_mcore.estimate.rates import all_reduce, gather, operation, product, traffic
from minitron_mcore.layout import axis_sizes
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.devices import Machine

# Attention's backward works its scores out again: five products where forward has two.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Traffic:
    """Numbers that are read and written, in forward and again in backward: of a norm for each channel, of a sum of
    residuals, of the rotation and the copies around attention, and of the activation for each neuron, gated or not."""

    norm: tuple[float, float]
    residual: tuple[float, float]
    attention: tuple[float, float]
    gated: tuple[float, float]
    plain: tuple[float, float]
    kernels: tuple[float, float]  # how many operations a layer has


# On a GPU norm and rotation are each one kernel. A gated activation, and on the CPU an RMS norm: model/elementwise.py.
FUSED = Traffic((2, 5), (3, 3), (4, 6), (5, 11), (4, 7), (14, 24))
ELEMENTWISE = Traffic((5, 12), (3, 3), (14, 20), (5, 11), (4, 7), (40, 60))


# Under context parallelism the local attention runs twice, on keys put in order, which makes half as many again.
CHUNKED = 1.5


@dataclass(frozen=True)
class Seconds:
    """Of one pass of one microbatch: what a rank computes; what it waits for of tensor-parallel and of context-parallel
    ranks, beyond what products hide."""

    compute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.compute + other.compute, self.tensor + other.tensor, self.context + other.context)

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.compute * times, self.tensor * times, self.context * times)

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.context


@dataclass(frozen=True)
class Pass:
    """A model's passes over microbatches on a rank: of `tokens` each, in sequences of `length` before they are cut over
    context-parallel ranks."""

    machine: Machine
    model: Architecture
    parallel: ParallelConfig
    precision: str
    tokens: int
    length: int
    on_cpu: bool

    @property
    def element(self) -> int:
        """Bytes of a number between the products, which fp8 keeps in bf16."""
        return BYTES.get(self.precision, 2)

    @property
    def wide(self) -> str:
        """The type of what is never fp8: attention and the output head."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def _traffic(self) -> Traffic:
        return ELEMENTWISE if self.on_cpu else FUSED

    def matrices(self) -> list[tuple[float, float]]:
        """(inputs, outputs) of a layer's products on a rank."""
        a, tensor, sizes = self.model, self.parallel.tensor, axis_sizes(self.model)
        up = sizes["gated_ffn"] if a.gated_linear_unit else sizes["ffn"]
        h = a.hidden_size
        return [(h, sizes["qkv"] / tensor), (sizes["heads"] / tensor, h), (h, up / tensor), (sizes["ffn"] / tensor, h)]

    def layer_forward(self) -> Seconds:
        """Of one layer."""
        attention = self._attention()
        return Seconds(
            self._products(self.matrices()) + attention + self._between(0),
            self._tensor_parallel(reductions=2),
            self._context_parallel(hidden=attention, times=1),
        )

    def layer_backward(self) -> Seconds:
        """Of one layer: two products for each of forward's, and the sum of the weights' gradients."""
        weights = [product(self.machine, i, self.tokens, o, self.precision) for i, o in self.matrices()]
        inputs = self._products([(o, i) for i, o in self.matrices()])
        count = sum(i * o for i, o in self.matrices())
        attention = ATTENTION_BACKWARD * self._attention()
        # What comes back over tensor-parallel ranks travels while the gradients of the weights are worked out.
        again = 2 if self.parallel.sequence else 0
        hides = 0.0 if self.on_cpu else weights[0] + weights[2]
        return Seconds(
            sum(weights) + inputs + self._sum_gradients(count) + attention + self._between(1),
            max(0.0, self._tensor_parallel(reductions=2, gathers=again) - hides),
            self._context_parallel(hidden=attention, times=1 if self.on_cpu else 2),
        )

    def mlp_forward(self) -> Seconds:
        """The part of a layer that selective recomputation runs again."""
        products = self._products(self.matrices()[2:])
        return Seconds(products + traffic(self.machine, self._activation(0)), self._tensor_parallel(reductions=1))

    def embedding_forward(self) -> Seconds:
        a, tensor = self.model, self.parallel.tensor
        moved = self.element * self.tokens * a.hidden_size * 2
        return Seconds(traffic(self.machine, moved), all_reduce(self.machine, moved / 2, tensor))

    def embedding_backward(self) -> Seconds:
        """The tokens' rows are added to what is there."""
        return Seconds(self._sum_gradients(self.tokens * self.model.hidden_size))

    def boundary(self) -> float:
        """Bytes of the hidden states that go from one pipeline stage to the next."""
        split = self.parallel.tensor if self.parallel.sequence else 1
        return self.element * self.tokens * self.model.hidden_size / split

    def _products(self, matrices: list[tuple[float, float]]) -> float:
        """Of all tokens with each of `matrices`; fp8 reads what it multiplies in bf16, and writes it narrow, before."""
        seconds = sum(product(self.machine, self.tokens, inner, outer, self.precision) for inner, outer in matrices)
        if self.precision == "fp8":
            seconds += traffic(self.machine, 4 * self.tokens * sum(inner for inner, _ in matrices))
        return seconds

    def _sum_gradients(self, count: float) -> float:
        """`count` gradients of the weights' type, read and added to fp32 ones."""
        return traffic(self.machine, (self.element + 8) * count)

    def _attention(self) -> float:
        """Over the causal half of the scores."""
        width = self.model.num_attention_heads * self.model.kv_channels / self.parallel.tensor
        groups = self.model.num_query_groups * self.model.kv_channels / self.parallel.tensor
        flops = 2 * self.tokens * self.length * width / self.machine.attention_efficiency
        if self.on_cpu and (parts := 2 * self.parallel.context) > 2:
            # Each of a rank's two chunks goes over all keys up to its own end, masked ones too (model/specs.py).
            flops *= (parts + 1) / parts
        moved = self.element * self.tokens * (2 * width + 2 * groups * self.parallel.context)
        return operation(self.machine, flops, moved, self.wide)

    def _between(self, way: int) -> float:
        """What is not a product, `way` 0 in forward, 1 in backward."""
        a, kinds, tensor = self.model, self._traffic, self.parallel.tensor
        split = tensor if self.parallel.sequence else 1
        width = (a.num_attention_heads + 2 * a.num_query_groups) * a.kv_channels
        whole = 2 * (kinds.norm[way] + kinds.residual[way]) * a.hidden_size / split
        moved = self.element * self.tokens * (whole + kinds.attention[way] * width / tensor) + self._activation(way)
        kernels = kinds.kernels[way] * (CHUNKED if self.on_cpu and self.parallel.context > 1 else 1)
        return traffic(self.machine, moved) + kernels * self.machine.kernel_latency

    def _activation(self, way: int) -> float:
        kind = self._traffic.gated if self.model.gated_linear_unit else self._traffic.plain
        return self.element * self.tokens * kind[way] * self.model.ffn_hidden_size / self.parallel.tensor

    def _tensor_parallel(self, reductions: int, gathers: int = 0) -> float:
        """So many all-reduces of a layer's states, under sequence parallelism an all-gather and a reduce-scatter each;
        and all-gathers beside."""
        states, size = self.element * self.tokens * self.model.hidden_size, self.parallel.tensor
        if not self.parallel.sequence:
            return all_reduce(self.machine, reductions * states, size, calls=reductions)
        count = 2 * reductions + gathers
        return gather(self.machine, count * states, size, calls=count)

    def _context_parallel(self, *, hidden: float, times: int) -> float:
        """Keys and values of the whole sequence, so many times, beyond what attention takes meanwhile."""
        size, tensor = self.parallel.context, self.parallel.tensor
        states = 2 * self.model.num_query_groups * self.model.kv_channels / tensor * self.element * self.tokens * size
        seconds = times * gather(self.machine, states, size, stride=tensor, calls=2)
        return seconds if self.on_cpu else max(0.0, seconds - hidden)


# Bytes of fp32 logits that are read and written for each token and vocabulary entry, beside the products: the student's
# alone, and with the teacher's. Two passes on a GPU, each one kernel; on the CPU torch's operations on cached blocks.
LOGITS = {False: (12, 20), True: (40, 90)}


def head_seconds(run: Pass, chunk: int) -> float:
    """The output head for a chunk of tokens, to fp32 logits."""
    columns, hidden = run.model.padded_vocab_size / run.parallel.tensor, run.model.hidden_size
    moved = BYTES[run.wide] * (chunk + columns) * hidden + 4 * chunk * columns
    return operation(run.machine, 2 * chunk * hidden * columns, moved, run.wide)


def log_prob_seconds(run: Pass, chunk_tokens: int | None) -> Seconds:
    """Of the tokens' log-probabilities alone, without gradients: the head, and one pass over the logits."""
    machine, tensor, tokens = run.machine, run.parallel.tensor, run.tokens
    chunk = min(chunk_tokens or default_chunk_tokens(tokens), tokens)
    logits, chunks = chunk * run.model.padded_vocab_size / tensor, tokens / chunk
    compute = head_seconds(run, chunk) + traffic(machine, LOGITS[run.on_cpu][False] * logits / 2)
    kernels = (10 if run.on_cpu else 4) * machine.kernel_latency
    between = chunks * gather(machine, 64 * chunk * tensor, tensor) if tensor > 1 else 0.0
    return Seconds(chunks * (compute + kernels), tensor=between)


def loss_seconds(student: Pass, teacher: Pass | None, chunk_tokens: int | None, *, again: bool = False) -> Seconds:
    """Of the loss between logits, on the last stage: both heads, the losses, and the gradients of the student's states
    and head, by chunks of tokens, each of which reads the heads and the head's fp32 gradient.

    again: the tokens' losses come first, in a sweep of their own; their weights are known only then.
    """
    machine, tensor, tokens = student.machine, student.parallel.tensor, student.tokens
    columns = student.model.padded_vocab_size / tensor
    chunk = min(chunk_tokens or default_chunk_tokens(tokens), tokens)
    h, wide = student.model.hidden_size, student.wide
    element, logits = BYTES[wide], chunk * columns
    of_logits = LOGITS[student.on_cpu][teacher is not None]
    compute = head_seconds(student, chunk)
    if teacher is not None:
        compute += head_seconds(replace(teacher, parallel=student.parallel, precision=student.precision), chunk)
    compute += traffic(machine, of_logits * logits)
    if wide == "bf16":  # the gradient in their type
        compute += traffic(machine, 6 * logits)
    flops = 2 * chunk * h * columns
    compute += operation(machine, flops, element * (logits + columns * h) + 4 * chunk * h, wide)
    compute += operation(machine, flops, element * (logits + chunk * h) + 8 * columns * h, wide)
    chunks = tokens / chunk
    seconds = Seconds(chunks * (compute + (20 if student.on_cpu else 8) * machine.kernel_latency))
    if again:
        seconds += log_prob_seconds(student, chunk_tokens)
    if tensor > 1:
        # A gather of some numbers a token in each chunk, the states over the sequence, and their gradient.
        states = student.element * tokens * h
        between = chunks * gather(machine, 64 * chunk * tensor, tensor)
        between += all_reduce(machine, states, tensor)
        if student.parallel.sequence and teacher is not None:
            between += gather(machine, teacher.element * tokens * teacher.model.hidden_size, tensor)
        seconds += Seconds(tensor=between)
    return seconds
