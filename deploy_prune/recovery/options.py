"""Every choice of a recovery as data, checked before a weight is touched. Imports nothing heavy: recipes hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy_prune.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Task

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Method = Literal["full", "lora", "diff"]

EPOCHS = 10.0  # where neither epochs nor steps are given
# What the SPP paper retrains with on ImageNet (arXiv 2501.03289, appendix): AdamW, 300 epochs, lr 1e-4 · batch / 512.
SPP_IMAGENET: dict[str, Any] = {
    "epochs": 300.0,
    "batch_size": 512,
    "weight_decay": 0.05,
    "drop_path": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "crop": 0.08,
    "flip": 0.5,
    "randaugment": "rand-m9-mstd0.5-inc1",
    "erasing": 0.25,
    "label_smoothing": 0.1,
    "ema": 0.99996,
    "patience": None,
}
RECIPES = {"spp-imagenet": SPP_IMAGENET}
IMAGE_OPTIONS = ("crop", "flip", "randaugment", "erasing", "mixup", "cutmix")
RANK = 16  # of adapters
# Chosen on held-out calibration data (bench/notes.md).
RATES: dict[Method, float] = {"full": 1e-4, "lora": 1e-3, "diff": 3e-4}
SHARE, FIND = 0.005, 0.5  # of a sparse delta


class RecoverOptions(BaseModel):
    """How a compact model is trained. `recipe` names a set of values that single options may still replace.

    The loss is `task_weight` · task loss + `logits_weight` · distance to the dense outputs + `hidden_weight` · relative
    squared error of the hidden states. Without labels there is no task loss, without a teacher no distillation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Literal["spp-imagenet"] | None = Field(None, description="the paper's retraining recipe for ImageNet")
    method: Method = Field(
        "full", description="train all weights, low-rank adapters that are merged at the end, or a sparse delta (diff)"
    )
    epochs: Positive | None = Field(None, description="passes over the training part; 10 unless `steps` are given")
    steps: Count | None = Field(None, description="optimiser steps, in place of `epochs`")
    examples: Count | None = Field(None, description="most calibration examples, held-out ones included; unset: all")
    batch_size: Count = Field(32, description="examples of one optimiser step, over all processes")
    lr: Positive | None = Field(
        None, description="peak learning rate (diff: while it is found); unset: that of the method or recipe"
    )
    warmup: Probability = Field(
        0.1, description="share of the steps in which the rate rises; then it falls by a cosine"
    )
    weight_decay: NotNegative = Field(0.05, description="of matrices; norms and biases have none, nor has diff")
    clip: Positive = Field(1.0, description="largest norm of the gradient")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 where it is faster: on GPUs and with AMX"
    )
    task_weight: NotNegative | None = Field(None, description="unset: 0.5 where the data has labels")
    logits_weight: NotNegative | None = Field(None, description="unset: 1 where there is a teacher")
    hidden_weight: NotNegative | None = Field(None, description="unset: 1 where there is a teacher")
    temperature: Positive = Field(1.0, description="softens dense and own logits before they are compared")
    holdout: Positive = Field(0.1, description="calibration examples kept for judging: a share below 1, or a number")
    evaluations: Count = Field(10, description="how often the held-out part is judged in the whole run")
    patience: Count | None = Field(5, description="stop after so many judgements without a better one; unset: never")
    ema: Probability | None = Field(None, description="decay of the running mean of weights that is kept instead")
    label_smoothing: Probability = Field(0.0, description="share of the target that goes to all classes alike")
    drop_path: Probability = Field(0.0, description="chance that a sublayer is skipped, at the last layer")
    crop: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="least share of an image a crop keeps")
    flip: Probability = Field(0.0, description="chance that an image is mirrored")
    randaugment: str | None = Field(None, description="timm's RandAugment, for instance rand-m9-mstd0.5-inc1")
    erasing: Probability = Field(0.0, description="chance that a rectangle of an image becomes noise")
    mixup: NotNegative = Field(0.0, description="alpha of mixup; 0 is off")
    cutmix: NotNegative = Field(0.0, description="alpha of cutmix; 0 is off")
    rank: Count = Field(RANK, description="of the adapters (lora)")
    alpha: Positive | None = Field(None, description="scale of the adapters (lora); unset: 2 · rank")
    share: Annotated[float, Field(gt=0, lt=1)] = Field(SHARE, description="of the weights that may change (diff)")
    find: Annotated[float, Field(gt=0, lt=1)] = Field(
        FIND, description="share of the steps in which it is found which weights change (diff)"
    )
    workers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="processes that prepare augmented images; unset: one per core on a GPU, else none"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("recipe") not in RECIPES:
            return data
        named = dict(RECIPES[data["recipe"]])
        if data.get("steps") is not None:
            del named["epochs"]
        batch = data.get("batch_size", named["batch_size"])
        if isinstance(batch, int):
            named["lr"] = 1e-4 * batch / 512
        return {**named, **data}

    @model_validator(mode="after")
    def _consistent(self) -> RecoverOptions:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("expected either `epochs` or `steps`")
        if self.task_weight == self.logits_weight == self.hidden_weight == 0:
            raise ValueError("expected one of `task_weight`, `logits_weight` and `hidden_weight` above 0")
        if self.method != "diff" and (self.share, self.find) != (SHARE, FIND):
            raise ValueError("`share` and `find` belong to `method: diff`")
        if self.method != "lora" and (self.rank, self.alpha) != (RANK, None):
            raise ValueError("`rank` and `alpha` belong to `method: lora`")
        return self

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else RATES[self.method]

    @property
    def augments(self) -> bool:
        """Whether single images are changed, so that they must be prepared anew each time."""
        return bool(self.crop is not None or self.flip or self.randaugment or self.erasing)

    @property
    def softens_labels(self) -> bool:
        return bool(self.label_smoothing or self.mixup or self.cutmix)


def check_fits(options: RecoverOptions, task: type[Task]) -> None:
    """Raise UsageError with every option that makes no sense for the task, UnavailableError when peft is missing."""
    import importlib.util

    from deploy_prune.tasks.causal_lm import CausalLM
    from deploy_prune.tasks.classification import Classification
    from deploy_prune.tasks.image_classification import ImageClassification

    problems = []
    if not issubclass(task, ImageClassification):
        set_here = [name for name in IMAGE_OPTIONS if getattr(options, name)]
        problems += [f"{name}: changes images, and {task.name} has none that it classifies" for name in set_here]
    if options.label_smoothing and not issubclass(task, Classification):
        problems.append(f"label_smoothing: {task.name} has no classes")
    if options.temperature != 1 and not issubclass(task, (Classification, CausalLM)):
        problems.append(f"temperature: the output of {task.name} is no logits")
    if problems:
        raise UsageError("recovery options that do not fit the task", where="recover", problems=problems)
    if options.method == "lora" and importlib.util.find_spec("peft") is None:
        raise UnavailableError(
            "recovery with adapters needs the package peft",
            where="recover.method lora",
            remedy="pip install 'deploy-prune[lora]', or train all weights: method full.",
        )
