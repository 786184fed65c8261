"""Everything that a run needs, in one frozen dataclass: what a file in `configs/` returns."""

from dataclasses import dataclass, field
from math import prod

from moe.balance import BalanceLoss
from moe.checkpoint import Checkpoints
from moe.data import Data
from moe.errors import UserError
from moe.mesh import BATCH, MeshConfig
from moe.nn import Init, TransformerConfig, check_layout
from moe.optim import AdamW, Optimizer
from moe.quant import Quantization


@dataclass(frozen=True)
class Train:
    """The training loop."""

    steps: int = 1000
    """Optimizer steps of the run."""

    batch_size: int = 32
    """Sequences of one step, over all devices and micro-batches."""

    accumulation: int = 1
    """Micro-batches of a step: gradients are summed over them, so activations take this much less memory."""

    loss_chunks: int = 1
    """Parts of the sequence whose logits are made one after the other; more for a large vocabulary."""

    average_decay: float = 0.0
    """Decay of the moving average of the parameters, which evaluation then uses (0.999 is usual); 0: none."""

    max_skipped: int = 20
    """The run stops after this many steps in a row whose loss or gradient was not finite."""

    log_every: int = 10
    """Steps between lines in metrics.jsonl, TensorBoard and on the terminal."""

    evaluate_every: int = 250
    """Steps between evaluations on the validation data; 0: only at the end."""

    evaluate_tokens: int = 100_000
    """Tokens of each slice in the evaluations on the way; the one at the end takes all."""

    profile: bool = False
    """Write an XProf trace of steps 10 to 15 into the run directory."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "loss_chunks", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.accumulation={self.accumulation} does not divide train.batch_size={self.batch_size}"
            )
        if not 0.0 <= self.average_decay < 1.0:
            raise UserError(f"train.average_decay={self.average_decay} must lie in [0, 1)")


@dataclass(frozen=True)
class Experiment:
    """One run: data, model, optimizer, loop, mesh, checkpoints."""

    name: str = "experiment"
    """Name of the run; its directory is runs/NAME."""

    seed: int = 0
    """Seed of parameters, data order and routing noise."""

    data: Data = field(default_factory=Data)
    """What the run reads."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    """The transformer."""

    init: Init | None = None
    """What the first parameters are made from, for example Upcycle(run="runs/quickstart_dense"); None draws
    all at random."""

    optimizer: Optimizer = field(default_factory=AdamW)
    """AdamW(...) or Muon(...)."""

    train: Train = field(default_factory=Train)
    """The training loop."""

    quantization: Quantization = field(default_factory=Quantization)
    """Training for quantised weights."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are laid out."""

    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    """When state is saved, and what is kept."""

    def __post_init__(self):
        if not self.name or ".." in self.name.split("/") or self.name.startswith("/"):
            raise UserError(f"name={self.name!r} must name a folder inside runs/")
        train = self.train
        if self.data.sequence_length % train.loss_chunks:
            raise UserError(
                f"train.loss_chunks={train.loss_chunks} does not divide "
                f"data.sequence_length={self.data.sequence_length}"
            )
        if self.model.moe_layers:
            moe = self.model.moe
            moe.routing.check_model(self.model.moe_layers, moe.tokens_per_group or self.data.sequence_length)
            for balancer in moe.balance:
                if isinstance(balancer, BalanceLoss):
                    balancer.check_batch(train.batch_size // train.accumulation)

    def check_devices(self, count: int) -> None:
        """Refuse a batch or a model that the devices cannot share.

        Raises:
            UserError: one line naming the field.
        """
        micro = self.train.batch_size // self.train.accumulation
        sharing = prod(self.mesh.sizes(count)[name] for name in BATCH)
        if micro % sharing:
            raise UserError(
                f"train.batch_size={self.train.batch_size} / train.accumulation={self.train.accumulation} "
                f"is {micro} sequences, which {sharing} devices cannot share; make it a multiple of {sharing}"
            )
        self.check_sharding(self.mesh, count, micro)

    def check_sharding(self, mesh: MeshConfig, count: int, sequences: int) -> None:
        """Refuse a mesh that cannot hold the model, or cannot share its tokens (`check_layout`).

        Args:
            mesh: of training or of an evaluation.
            count: devices in it.
            sequences: taken at once, over all devices.

        Raises:
            UserError: one line naming the field.
        """
        length, chunks = self.data.sequence_length, self.train.loss_chunks
        check_layout(self.model, mesh, count, sequences=sequences, length=length, loss_chunks=chunks)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a tokenizer that knows more tokens than the model.

        Raises:
            UserError: one line naming both.
        """
        if vocab_size > self.model.vocab_size:
            raise UserError(
                f"the tokenizer has {vocab_size} tokens, model.vocab_size={self.model.vocab_size} holds "
                f"fewer; set --model.vocab_size {-(-vocab_size // 128) * 128} or change data.tokenizer"
            )
