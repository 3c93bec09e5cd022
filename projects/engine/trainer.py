"""The training loop. Trainers are chosen by registered name (SOLVER.TRAINER), so that the launcher knows no paper."""

import logging
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.registry import Registry
from torch.nn.parallel import DistributedDataParallel

from projects.data.loader import build_train_loader
from projects.errors import CheckpointError, ConfigError
from projects.evaluation.evaluate import evaluate, validation_losses
from projects.modeling.build import build_model

from .checkpoint import STRIPPED, Checkpointer, rng_preserved, rng_state, set_rng_state
from .divergence import check_finite, mean_over_processes
from .hooks import BestCheckpoint, LossCurves, PeriodicCheckpoint, PreciseBN, build_writers
from .optimizer import build_optimizer, build_scheduler

logger = logging.getLogger(__name__)

ONE_SIGNAL = 1.0  # seconds: one Ctrl-C comes from the terminal and from the launcher, and is not two

TRAINER_REGISTRY = Registry("TRAINER")
TRAINER_REGISTRY.__doc__ = """
Trainers by class name, built as ``cls(cfg, trust)``. A trainer has ``resume_or_load(resume)``, ``train()`` and ``model``,
and after ``train()`` the attributes ``stopped_by`` (number of the signal that ended it, or None) and ``results``.
"""


def build_trainer(cfg: CfgNode, trust: bool = False):
    """The trainer that SOLVER.TRAINER names."""
    if cfg.SOLVER.TRAINER not in TRAINER_REGISTRY:
        known = ", ".join(name for name, _ in TRAINER_REGISTRY)
        raise ConfigError(f"SOLVER.TRAINER: there is no trainer '{cfg.SOLVER.TRAINER}'. There are: {known}.")
    return TRAINER_REGISTRY.get(cfg.SOLVER.TRAINER)(cfg, trust)


@TRAINER_REGISTRY.register()
class StandardTrainer(TrainerBase):
    """One model, one optimizer, the sum of the losses; data-parallel over processes.

    Its checkpoints hold model, optimizer, scheduler, loss scaler, loader position, iteration and the generator states of
    every process, so that a resumed run is the run that was interrupted. A trainer with more state overrides
    ``checkpointables`` and ``run_step``; one that diverges in ways of its own has ``advice``, which ends the message then.
    """

    advice = ""

    def __init__(self, cfg: CfgNode, trust: bool = False):
        super().__init__()
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.accumulate = cfg.SOLVER.ACCUMULATE
        for key in ("IMS_PER_BATCH", "MAX_ITER", "CHECKPOINT_PERIOD", "LOG_PERIOD", "ACCUMULATE"):
            if cfg.SOLVER[key] < 1:
                raise ConfigError(f"SOLVER.{key} is {cfg.SOLVER[key]}: expected at least 1.")
        if cfg.INPUT.MASK_FORMAT not in ("polygon", "bitmask"):
            raise ConfigError(f"INPUT.MASK_FORMAT is '{cfg.INPUT.MASK_FORMAT}': expected 'polygon' or 'bitmask'.")
        if self.max_iter <= cfg.SOLVER.WARMUP_ITERS:
            logger.warning(
                "SOLVER.MAX_ITER is %d and SOLVER.WARMUP_ITERS %d: the learning rate never rises to SOLVER.BASE_LR.",
                self.max_iter,
                cfg.SOLVER.WARMUP_ITERS,
            )
        self.model = build_model(cfg)
        self.optimizer = build_optimizer(cfg, self.model)
        self.scheduler = build_scheduler(cfg, self.optimizer)
        self.loader = build_train_loader(cfg, cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed())
        self.autocast, self.scaler = mixed_precision(cfg)
        self.parallel_model = wrap_for_processes(self.model)
        self.checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trust=trust, **self.checkpointables())
        self.stopped_by: int | None = None
        self.results: Mapping = {}
        self._signal: int | None = None
        self._signal_time = 0.0
        self._evaluating = False

    def checkpointables(self) -> dict:
        """What a checkpoint holds beside the model: name -> object with ``state_dict`` and ``load_state_dict``."""
        items = {"optimizer": self.optimizer, "scheduler": self.scheduler, "loader": self.loader}
        return items | ({"scaler": self.scaler} if self.scaler.is_enabled() else {})

    def build_hooks(self) -> list:
        cfg = self.cfg
        built = [
            hooks.IterationTimer(),
            PreciseBN(cfg, self.loader.seed) if cfg.TEST.PRECISE_BN.ENABLED else None,
            PeriodicCheckpoint(cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_KEPT, cfg.TEST.EVAL_PERIOD),
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate),
        ]
        if cfg.TEST.BEST_METRIC:
            built.append(BestCheckpoint(cfg.TEST.BEST_METRIC, cfg.OUTPUT_DIR))
        if comm.is_main_process():
            period = cfg.SOLVER.LOG_PERIOD
            built.append(hooks.PeriodicWriter(build_writers(cfg.OUTPUT_DIR, self.start_iter, self.max_iter, period), period))
            built.append(LossCurves(cfg.OUTPUT_DIR, cfg.SOLVER.CHECKPOINT_PERIOD))
        return built

    def resume_or_load(self, resume: bool) -> None:
        """With ``resume``, go on from OUTPUT_DIR's newest whole checkpoint if there is one; else load MODEL.WEIGHTS."""
        state = self.checkpointer.resume() if resume else None
        iterations = comm.all_gather(-1 if state is None else state.get("iteration", -1))
        if len(set(iterations)) > 1:
            raise CheckpointError(
                f"The processes found different checkpoints in OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' (iterations {iterations}, "
                "-1: none). All machines must see the same folder, or a copy of it."
            )
        if state is None:
            if comm.is_main_process():
                for leftover in ("metrics.json", "best.json", "model_best.pth"):
                    (Path(self.cfg.OUTPUT_DIR) / leftover).unlink(missing_ok=True)
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
            self.checkpointer.refuse_random(self.cfg.MODEL.WEIGHTS)
            comm.synchronize()
            return
        if STRIPPED in state:
            raise CheckpointError(
                f"The checkpoint in OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' was stripped of {len(state[STRIPPED])} weights that "
                "only training needs, so training cannot go on from it. Put back the checkpoint that it was made from. To "
                "start a new run from its weights, set MODEL.WEIGHTS to it and OUTPUT_DIR to another folder."
            )
        if "rng" not in state:
            raise ConfigError(
                f"The checkpoint in OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' holds weights only, so training cannot go on from it. "
                "To start from its weights, set MODEL.WEIGHTS to it and OUTPUT_DIR to another folder."
            )
        self.start_iter = state["iteration"] + 1
        if self.max_iter < self.start_iter:
            raise ConfigError(
                f"SOLVER.MAX_ITER is {self.max_iter}, but the checkpoint '{self.checkpointer.resumed_from}' was saved after "
                f"{self.start_iter} iterations: set SOLVER.MAX_ITER to more than that, or to {self.start_iter} to end there."
            )
        if self.cfg.MODEL.WEIGHTS:
            went_on, weights = self.checkpointer.resumed_from, self.cfg.MODEL.WEIGHTS
            logger.info("Training goes on from '%s'; MODEL.WEIGHTS '%s' is not read.", went_on, weights)
        if len(state["rng"]) == comm.get_world_size():
            set_rng_state(state["rng"][comm.get_rank()])

    def train(self) -> None:
        """Train from ``start_iter`` to ``max_iter``, or until SIGINT or SIGTERM: then the iteration is finished and saved.

        A second signal does not wait for that, and neither does one in an evaluation, before which everything is saved: they
        raise ``KeyboardInterrupt(number of the signal)``.
        """
        if 0 < self.start_iter < self.max_iter:
            self.checkpointer.continue_after_final(self.start_iter - 1)
        self.register_hooks(self.build_hooks())
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        logger.info("Training from iteration %d to %d", self.start_iter, self.max_iter)
        self.parallel_model.train()
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                for iteration in range(self.start_iter, self.max_iter):
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self.stopped_by is not None and self.iter + 1 < self.max_iter:
                        self.save_periodic()
                        logger.warning("Stopped after %d of %d iterations; --resume goes on.", self.iter + 1, self.max_iter)
                        break
                else:
                    self.iter, self.stopped_by = self.max_iter, None  # tells the hooks that training is complete
                self.loader.close()
                self.after_train()
            except BaseException:
                self.close_writers()
                raise
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)
                self.loader.close()
        comm.synchronize()

    def close_writers(self) -> None:
        """After an exception: the hooks that write what there is. The others need a whole model, or all processes."""
        for hook in self._hooks:
            if isinstance(hook, (hooks.PeriodicWriter, LossCurves)):
                hook.after_train()

    def run_step(self) -> None:
        """A step on the mean gradient of SOLVER.ACCUMULATE batches."""
        self.optimizer.zero_grad(set_to_none=True)
        means, data_time = Counter(), 0.0
        for part in range(self.accumulate):
            states = rng_state()
            start = time.perf_counter()
            batch = next(self.loader)
            data_time += time.perf_counter() - start
            with exchange(self.parallel_model, now=part + 1 == self.accumulate):
                losses = self.forward(batch)
                means.update(self.record(losses, batch, states))
                self.scaler.scale(sum(losses.values()) / self.accumulate).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        means = {name: total / self.accumulate for name, total in means.items()}
        self.storage.put_scalar("data_time", data_time)
        self.storage.put_scalars(total_loss=sum(means.values()), **means)
        self.storage.put_scalar("lr", self.optimizer.param_groups[0]["lr"], smoothing_hint=False)
        self.scheduler.step()

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        """The losses of a batch; empty when Detectron2 breaks the forward pass off because a proposal is not finite."""
        try:
            with self.autocast():
                return self.parallel_model(batch)
        except FloatingPointError as error:
            logger.error("%s", error)
            return {}

    def record(self, losses: dict, batch: list[dict], states: dict) -> dict[str, float]:
        """The means of the losses over the processes. Stops all processes when one is not finite, or got a signal."""
        means, stop = mean_over_processes(losses, self._signal is not None)
        if stop:
            self.stopped_by = self._signal or signal.SIGTERM
        context = {"cfg": self.cfg, "iteration": self.iter, "seed": self.loader.seed, "rng": states}
        context |= {"save_weights": self.checkpointer.save_weights, "advice": self.advice}
        check_finite(means, losses, batch, context)
        return means

    def save(self, name: str) -> None:
        """Save everything as ``OUTPUT_DIR/{name}.pth``. Every process calls it."""
        self.checkpointer.save(name, iteration=self.iter, rng=comm.gather(rng_state()))

    def save_periodic(self) -> None:
        self.save(f"model_{self.iter:07d}")

    def evaluate(self) -> Mapping:
        """Evaluate on DATASETS.TEST, unless training is about to stop. Leaves generators and the model's mode as they were."""
        if self.stopped_by is not None:
            return {}
        if self._signal is not None:
            raise KeyboardInterrupt(self._signal)
        self._evaluating = True
        try:
            with rng_preserved():
                share_buffers(self.model)
                self.results = evaluate(self.cfg, self.model)
                if self.cfg.TEST.VALIDATION_LOSS:
                    last = min(self.iter, self.max_iter - 1)  # which the iteration is, but for the evaluation at the end
                    self.storage.put_scalars(**validation_losses(self.cfg, self.model, last), smoothing_hint=False)
        finally:
            self._evaluating = False
        return self.results

    def _on_signal(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._signal is not None and now - self._signal_time < ONE_SIGNAL:
            return
        first, self._signal, self._signal_time = self._signal is None, number, now
        if self._evaluating or not first:
            raise KeyboardInterrupt(number)
        logger.warning("Got %s: finishing this iteration, then saving.", signal.Signals(number).name)


def mixed_precision(cfg: CfgNode):
    """Autocast context and loss scaler for SOLVER.AMP. On the CPU, and without it, both do nothing."""
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if cfg.SOLVER.AMP.DTYPE not in dtypes:
        raise ConfigError(f"SOLVER.AMP.DTYPE is '{cfg.SOLVER.AMP.DTYPE}': expected one of {', '.join(dtypes)}.")
    dtype, device = dtypes[cfg.SOLVER.AMP.DTYPE], torch.device(cfg.MODEL.DEVICE).type
    enabled = cfg.SOLVER.AMP.ENABLED and device == "cuda"
    if cfg.SOLVER.AMP.ENABLED and not enabled:
        logger.warning("SOLVER.AMP.ENABLED: mixed precision is for GPUs; this run computes in float32.")
    scaler = torch.amp.GradScaler(device, enabled=enabled and dtype == torch.float16)
    return lambda: torch.autocast(device, dtype, enabled=enabled), scaler


def wrap_for_processes(model: torch.nn.Module) -> torch.nn.Module:
    """DistributedDataParallel when there are several processes.

    Where batch norm keeps statistics, those of the first process are sent to all before each step, so that a checkpoint
    (which the first process writes) holds what every process trained with.
    """
    if comm.get_world_size() == 1:
        return model
    batch_norm = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [comm.get_local_rank()] if on_gpu else None
    return create_ddp_model(model, broadcast_buffers=batch_norm, device_ids=device_ids)


def exchange(model: torch.nn.Module, now: bool) -> AbstractContextManager:
    """The gradients of what runs inside are averaged over the processes now, or with those of the next block that does so."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


def share_buffers(model: torch.nn.Module) -> None:
    """Give all processes the buffers of the first one, which is what DistributedDataParallel does before each step only."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
