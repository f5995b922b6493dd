"""Methods in loops of accelerate, Lightning and Hugging Face: the arithmetic of a plain one, also when resumed."""

import importlib.util
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import DataError, MissingExtra, PlanError, SpecError
from secateur.train import ACDC, Gradual, Movement, RigL

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS, BATCH, ACCUMULATED = 24, 8, 2

X = torch.randn(STEPS * ACCUMULATED * BATCH, 6, generator=torch.Generator().manual_seed(3))
Y = (X[:, :3].sum(1) > 0).long()

GRADUAL = partial(Gradual, budget="sparsity=75%", begin=4, end=20, every=4)
METHODS = [
    GRADUAL,
    partial(RigL, budget="sparsity=50%", every=3),
    partial(ACDC, budget="sparsity=50%"),
    partial(Movement, budget="sparsity=60%"),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # lightning 2.6 on torch 2.13
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the one that saves is left out
]


class Net(nn.Module):
    """Gives its loss where there are labels, as Hugging Face's models do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2))
        self.seen = []

    def forward(self, x, labels=None):
        self.seen.append(x)
        logits = self.body(x)
        return {"logits": logits, **({} if labels is None else {"loss": F.cross_entropy(logits, labels)})}


def net(dropout: float = 0.0) -> Net:
    torch.manual_seed(1)
    return Net(dropout)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain(make, batches, accumulated=ACCUMULATED, clip=None):
    """The loop that others are compared with: the model, and the plan."""
    model = net()
    optimizer = sgd(model)
    pruner = make(model, optimizer, steps=STEPS)
    for i, x in enumerate(batches):
        labels = (x[:, :3].sum(1) > 0).long()
        (model(x, labels)["loss"] / accumulated).backward()
        if (i + 1) % accumulated == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
    return model, pruner.finish()


def require_same(model, plan, other, other_plan):
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert plan.masks.keys() == other_plan.masks.keys()
    assert all(torch.equal(mask, other_plan.masks[name]) for name, mask in plan.masks.items())
    assert sum(int((~mask).sum()) for mask in plan.masks.values()) >= 60  # of 128


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def process_as_it_was():
    """On a CPU accelerate, and so the Trainer, sets variables and threads; by these it makes a process group later."""
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)


# --- optimizers as they come -----------------------------------------------------------------------


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.func.__name__)
@pytest.mark.parametrize("positional", [True, False])
def test_gradients_made_inside_the_step_are_those_that_count(make, positional):
    batches = X.split(BATCH)[:STEPS]
    model = net()
    optimizer = sgd(model)
    pruner = make(model, optimizer, steps=STEPS)
    for x in batches:

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x, (x[:, :3].sum(1) > 0).long())["loss"]
            loss.backward()
            return loss.item()

        loss = optimizer.step(closure) if positional else optimizer.step(closure=closure)
        assert isinstance(loss, float)
        pruner.step()
    require_same(model, pruner.finish(), *plain(make, batches, accumulated=1))


def test_an_optimizer_that_evaluates_the_loss_several_times_is_refused():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    GRADUAL(model, optimizer, steps=STEPS)

    def closure():
        optimizer.zero_grad()
        loss = model(X[:8], Y[:8])["loss"]
        loss.backward()
        return loss

    with pytest.raises(SpecError, match="LBFGS evaluates the loss several times in one step"):
        optimizer.step(closure)


def test_what_is_no_optimizer_is_refused(accelerator):
    from accelerate.optimizer import AcceleratedOptimizer

    with pytest.raises(SpecError, match=r"optimizer is a list, expected a torch\.optim\.Optimizer"):
        GRADUAL(net(), [], steps=STEPS)

    class Engine:
        """DeepSpeed's is no subclass of torch's."""

    around = AcceleratedOptimizer(Engine(), device_placement=False)
    with pytest.raises(SpecError, match="optimizer is a AcceleratedOptimizer, expected"):
        GRADUAL(net(), around, steps=STEPS)


def test_the_plain_example_runs(capsys):
    module = example("training_plain")
    module.EPOCHS = 4
    assert module.main() > 0.8
    assert "8525 of 9472 weights are zero" in capsys.readouterr().out


# --- accelerate ------------------------------------------------------------------------------------


def accelerated(accelerator, make, folder=None, stop=None, resume=False):
    data = torch.utils.data.TensorDataset(X, Y)
    model, optimizer, batches = accelerator.prepare(
        (inner := net()), sgd(inner), torch.utils.data.DataLoader(data, BATCH)
    )
    pruner = make(model, optimizer, steps=STEPS)
    accelerator._custom_objects.clear()
    accelerator.register_for_checkpointing(pruner)
    begin = 0
    if resume:
        accelerator.load_state(folder)
        begin = stop
        stop = None
    for i, (x, labels) in enumerate(batches):
        if i < begin:
            continue
        if i == stop:
            accelerator.save_state(folder)
            pruner.detach()
            accelerator.free_memory()
            return None
        with accelerator.accumulate(model):
            accelerator.backward(model(x, labels)["loss"])
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
    return inner, pruner.finish()


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.func.__name__)
def test_accelerate_is_the_plain_loop_and_resumes(make, accelerator, tmp_path):
    expected = plain(make, X.split(BATCH))
    require_same(*accelerated(accelerator, make), *expected)
    accelerator.free_memory()
    assert accelerated(accelerator, make, tmp_path / "state", stop=26) is None
    require_same(*accelerated(accelerator, make, tmp_path / "state", stop=26, resume=True), *expected)


def test_a_step_that_accelerates_scaler_leaves_out_is_none(accelerator):
    from accelerate.optimizer import AcceleratedOptimizer

    model = net()
    optimizer = AcceleratedOptimizer(sgd(model), scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    pruner = GRADUAL(model, optimizer, steps=STEPS)
    accelerator.gradient_state._set_sync_gradients(True)
    for scale in (1.0, torch.inf, 1.0):
        optimizer.scaler.scale(model(X[:8], Y[:8])["loss"] * scale).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.applied == 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_accelerate_example_runs(accelerator):
    module = example("training_accelerate")
    module.EPOCHS = 6
    assert module.main() > 0.8


# --- Hugging Face ----------------------------------------------------------------------------------


@pytest.fixture
def hf(torchvision):
    """transformers needs torchvision to be importable, or not to be there."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    return transformers


class Stop(Exception):
    pass


def trainer(hf, folder, callbacks, model=None, **arguments):
    wanted = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATED,
        "max_grad_norm": 0.0, "save_steps": 7, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "logging_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    model = model or net()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return hf.Trainer(
        model,
        hf.TrainingArguments(str(folder), **{**wanted, **arguments}),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)],
        callbacks=callbacks,
        optimizers=(optimizer, schedule),
    )


def stopping(hf, step, gently=False):
    class Stopping(hf.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step:
                if not gently:
                    raise Stop
                control.should_training_stop = True

    return Stopping()


@pytest.fixture
def hf_callback(hf):
    from secateur.train.integrations.hf import PruningCallback

    return PruningCallback


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.func.__name__)
def test_the_trainer_is_the_plain_loop(make, hf, hf_callback, tmp_path):
    pruning, model = hf_callback(make), net()
    trainer(hf, tmp_path, [pruning], model, save_strategy="no").train()
    require_same(model, pruning.plan, *plain(make, model.seen))
    assert pruning.pruner.applied == STEPS


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.func.__name__)
def test_the_trainer_goes_on_from_its_checkpoints_wherever_they_are(make, hf, hf_callback, tmp_path):
    whole, model = hf_callback(make), net(0.3)
    trainer(hf, tmp_path / "whole", [whole], model).train()
    first = trainer(hf, tmp_path / "stopped", [hf_callback(make), stopping(hf, 17)], net(0.3))
    with pytest.raises(Stop):
        first.train()
    shutil.move(tmp_path / "stopped" / "checkpoint-14", tmp_path / "elsewhere")
    rest, other = hf_callback(make), net(0.3)
    again = trainer(hf, tmp_path / "again", [rest], other)
    again.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    require_same(model, whole.plan, other, rest.plan)
    assert not any("secateur" in str(key) for key in again.optimizer.state_dict()["state"])


def test_a_trainer_that_was_cut_off_is_called_again(hf, hf_callback, tmp_path):
    whole, model = hf_callback(GRADUAL), net(0.3)
    trainer(hf, tmp_path / "whole", [whole], model).train()
    pruning, stop, other = hf_callback(GRADUAL), stopping(hf, 17), net(0.3)
    cut = trainer(hf, tmp_path / "cut", [pruning, stop], other)
    with pytest.raises(Stop):
        cut.train()
    cut.remove_callback(stop)
    cut.train(resume_from_checkpoint=True)
    require_same(model, whole.plan, other, pruning.plan)


def test_the_trainer_in_bfloat16(hf, hf_callback, tmp_path):
    pruning, model = hf_callback(GRADUAL), net()
    trainer(hf, tmp_path, [pruning], model, save_strategy="no", bf16=True).train()
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if "weight" in name)
    assert zeros == sum(int((~mask).sum()) for mask in pruning.plan.masks.values()) == 96


def test_trainers_that_cannot_prune(hf, hf_callback, tmp_path):
    pruning = hf_callback(GRADUAL)
    with pytest.raises(PlanError, match=r"9 steps were applied, and the budget sparsity=75% is reached at step 20"):
        trainer(hf, tmp_path, [pruning, stopping(hf, 9, gently=True)], save_strategy="no").train()
    assert pruning.plan is None
    with pytest.raises(SpecError, match="a Gradual prunes with this optimizer already"):
        trainer(hf, tmp_path, [hf_callback(GRADUAL), hf_callback(GRADUAL)]).train()
    with pytest.raises(SpecError, match="load_best_model_at_end would bring back weights"):
        trainer(
            hf, tmp_path, [hf_callback(GRADUAL)], load_best_model_at_end=True, eval_strategy="no", save_strategy="best",
            metric_for_best_model="loss",
        ).train()  # fmt: skip
    with pytest.raises(SpecError, match="steps is 0; expected how many steps"):
        trainer(hf, tmp_path, [hf_callback(GRADUAL)], max_steps=-1, num_train_epochs=0).train()
    with pytest.raises(SpecError, match="make gave a NoneType, expected a method"):
        trainer(hf, tmp_path, [hf_callback(lambda model, optimizer, steps: None)]).train()


def test_checkpoints_of_trainings_without_a_method_or_with_another_are_refused(hf, hf_callback, tmp_path):
    with pytest.raises(Stop):
        trainer(hf, tmp_path, [stopping(hf, 8)]).train()
    with pytest.raises(DataError, match="goes on from step 7, and its checkpoint holds no state of a pruning method"):
        trainer(hf, tmp_path, [hf_callback(GRADUAL)]).train(resume_from_checkpoint=True)
    with pytest.raises(Stop):
        trainer(hf, tmp_path, [hf_callback(GRADUAL), stopping(hf, 8)]).train()
    with pytest.raises(DataError, match="the state is of another training: method was Gradual, is now RigL"):
        trainer(hf, tmp_path, [hf_callback(METHODS[1])]).train(resume_from_checkpoint=True)


def test_the_trainer_example_runs_and_goes_on(hf, tmp_path):
    module = example("training_trainer")
    score = module.main(str(tmp_path))
    assert score > 0.9
    shutil.rmtree(tmp_path / "checkpoint-200")
    assert module.main(str(tmp_path)) == score


# --- Lightning -------------------------------------------------------------------------------------


@pytest.fixture
def lightning(torchvision):
    """torchmetrics needs torchvision to be importable, or not to be there."""
    pytest.importorskip("lightning")
    import lightning.pytorch

    return lightning.pytorch


@pytest.fixture
def lightning_callback(lightning):
    from secateur.train.integrations.lightning import PruningCallback

    return PruningCallback


def module_of(lightning, optimizers=1):
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.automatic_optimization = optimizers == 1

        def training_step(self, batch, _):
            return self.net(*batch)["loss"]

        def configure_optimizers(self):
            found = [sgd(self.net) for _ in range(optimizers)]
            return found if optimizers > 1 else found[0]

    return Module()


def fit(lightning, module, callbacks, resume=None, **arguments):
    wanted = {
        "max_epochs": 4, "accumulate_grad_batches": ACCUMULATED, "accelerator": "cpu", "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    quarter = torch.utils.data.TensorDataset(X[: len(X) // 4], Y[: len(X) // 4])
    found = lightning.Trainer(**{**wanted, **arguments}, callbacks=callbacks)
    found.fit(module, torch.utils.data.DataLoader(quarter, BATCH), ckpt_path=resume)
    return module.net


def of_net(make):
    return lambda module, optimizer, steps: make(module.net, optimizer, steps=steps)


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.func.__name__)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_lightning_is_the_plain_loop(make, clip, lightning, lightning_callback):
    pruning = lightning_callback(of_net(make))
    model = fit(lightning, module_of(lightning), [pruning], gradient_clip_val=clip)
    require_same(model, pruning.plan, *plain(make, model.seen, clip=clip))


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.func.__name__)
def test_lightning_goes_on_from_its_checkpoints(make, lightning, lightning_callback, tmp_path):
    class Stopping(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 15:
                raise Stop

    whole = lightning_callback(of_net(make))
    model = fit(lightning, module_of(lightning), [whole])
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    with pytest.raises(Stop):
        fit(
            lightning, module_of(lightning), [saver, lightning_callback(of_net(make)), Stopping()],
            enable_checkpointing=True,
        )  # fmt: skip
    rest = lightning_callback(of_net(make))
    other = fit(lightning, module_of(lightning), [rest], resume=tmp_path / "step=12.ckpt")
    require_same(model, whole.plan, other, rest.plan)


def test_lightning_in_bfloat16_prunes_the_whole_module(lightning, lightning_callback):
    pruning = lightning_callback(GRADUAL)
    model = fit(lightning, module_of(lightning), [pruning], precision="bf16-mixed")
    assert set(pruning.plan.masks) == {"net.body.0.weight", "net.body.3.weight"}
    assert sum(int((p == 0).sum()) for name, p in model.named_parameters() if "weight" in name) == 96


def test_lightning_trainings_that_cannot_prune(lightning, lightning_callback, tmp_path):
    class Early(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    pruning = lightning_callback(GRADUAL)
    with pytest.raises(PlanError, match=r"6 steps were applied, and the budget sparsity=75% is reached at step 20"):
        fit(lightning, module_of(lightning), [pruning, Early()])
    assert pruning.plan is None
    two = [lightning_callback(GRADUAL), lightning_callback(GRADUAL)]
    two[1].__class__ = type("Second", (lightning_callback,), {})  # Lightning itself refuses two of one class
    with pytest.raises(SpecError, match="a Gradual prunes with this optimizer already"):
        fit(lightning, module_of(lightning), two)
    with pytest.raises(SpecError, match="steps is inf; expected how many steps"):
        fit(lightning, module_of(lightning), [lightning_callback(GRADUAL)], max_epochs=-1)
    with pytest.raises(SpecError, match="this training has 2 optimizers, expected one"):
        fit(lightning, module_of(lightning, 2), [lightning_callback(GRADUAL)], accumulate_grad_batches=1)
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, "dense", save_top_k=-1)
    fit(lightning, module_of(lightning), [saver], max_epochs=1, enable_checkpointing=True)
    with pytest.raises(DataError, match="goes on from step 6, and its checkpoint holds no state"):
        fit(lightning, module_of(lightning), [lightning_callback(GRADUAL)], resume=tmp_path / "dense.ckpt")


def test_the_lightning_example_runs(lightning):
    assert example("training_lightning").main() > 0.8


# --- without them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "package"), [("hf", "transformers"), ("lightning", "lightning.pytorch")])
def test_without_the_package_the_extra_is_named(module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"secateur.train.integrations.{module}", raising=False)
    with pytest.raises(MissingExtra, match=rf"pip install 'secateur\[{module}\]'"):
        importlib.import_module(f"secateur.train.integrations.{module}")
