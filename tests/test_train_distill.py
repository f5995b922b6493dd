"""Distillation inside one's own loop: the loss's value, whose tensors are shared, and what is left behind."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import DataError, SpecError
from secateur.recover.distill import distillation_loss
from secateur.train.distill import Distill

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1, 2])


def net(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3))


def softened(logits, temperature):
    e = np.exp(np.asarray(logits.detach(), dtype=np.float64) / temperature)
    return e / e.sum(1, keepdims=True)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_loss_is_the_sum_of_its_terms():
    student, teacher = net(), net()
    with Distill(student, teacher, temperature=3.0, alpha=0.7, features={"1": 0.5, "0": 2.0}) as distill:
        output = student(X)
        loss = F.cross_entropy(output, Y)
        found = distill(output, loss, X)
    learned = student[0](X)
    normed = learned.sub(learned.mean(0)).div(learned.var(0, unbiased=False).add(1e-5).sqrt())
    teacher.eval()
    with torch.no_grad():
        p, told = softened(teacher(X), 3.0), teacher[0](X)
        told_normed = teacher[1](told)
    q = softened(output, 3.0)
    apart = [((a - b).square().sum() / b.square().sum()).item() for a, b in ((normed, told_normed), (learned, told))]
    kl = float((p * np.log(p / q)).sum(1).mean())
    expected = 0.7 * 9 * kl + 0.3 * loss.item() + 0.5 * apart[0] + 2.0 * apart[1]
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert found.shape == ()


def test_a_teacher_that_is_the_student_teaches_nothing_but_the_task():
    student = net().eval()
    with Distill(student, alpha=0.9, features={"0": 3.0}) as distill:
        output = student(X)
        loss = F.cross_entropy(output, Y)
        assert distill(output, loss, X).item() == pytest.approx(0.1 * loss.item())


def test_gradients_are_the_students_alone_and_the_teacher_stays_what_it_was():
    student, teacher = net(), net()
    teacher[1].eval()
    modes, before = [m.training for m in teacher.modules()], copy.deepcopy(teacher.state_dict())
    distill = Distill(student, teacher, features={"0": 1.0})
    output = student(X)
    distill(output, F.cross_entropy(output, Y), X).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert [m.training for m in teacher.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert hooks(teacher) == 0
    assert hooks(student) == 1
    distill.close()
    assert hooks(student) == 0


def test_no_teacher_means_the_student_as_it_is_now_sharing_what_is_not_trained():
    student = net().train()
    student[0].requires_grad_(False)
    teacher = Distill(student).teacher
    assert teacher[0].weight is student[0].weight
    assert teacher[4].weight is not student[4].weight
    assert not any(p.requires_grad for p in teacher.parameters())
    assert student[4].weight.requires_grad
    assert not teacher.training
    assert student.training
    dense = teacher(X)
    with torch.no_grad():
        student[4].weight.zero_()
        student(X)  # moves the student's running averages, not the teacher's
    assert torch.equal(teacher(X), dense)


def test_terms_of_weight_zero_are_not_computed():
    student = net()
    output = student(X)
    with pytest.raises(DataError, match="expected two tensors of one shape"):
        Distill(student, nn.Linear(4, 2))(output, output.sum(), X)
    assert torch.equal(Distill(student, nn.Linear(4, 2), alpha=0.0)(output, output.sum(), X), output.sum())
    nan = torch.tensor(torch.nan)
    assert Distill(student, net(), alpha=1.0)(output, nan, X).isfinite()


def test_dead_layers_and_masked_classes_give_finite_losses_and_gradients():
    student, teacher = net(), net()
    with torch.no_grad():
        teacher[0].weight.zero_()
        teacher[0].bias.zero_()
    with Distill(student, teacher, features={"0": 1.0}) as distill:
        output = student(X)
        loss = distill(output, F.cross_entropy(output, Y), X)
        loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters())
    logits = torch.randn(3, 4, requires_grad=True)
    masked, told = logits.masked_fill(torch.tensor([False, True, False, False]), -torch.inf), torch.randn(3, 4)
    told[:, 1] = -torch.inf
    found = distillation_loss(masked, told, 2.0)
    found.backward()
    kept = [0, 2, 3]
    assert torch.allclose(found, distillation_loss(logits[:, kept], told[:, kept], 2.0))
    assert logits.grad.isfinite().all()


def test_batches_of_several_inputs_and_outputs_with_logits():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.pair = nn.Linear(4, 3), nn.Identity()

        def forward(self, a, b=None):
            first, _ = self.pair((self.fc(a), b))
            return Output(first + b)

    student, teacher = Two(), Two()
    b = torch.randn(6, 3)
    for inputs, output in (((X, b), student(X, b)), ({"b": b, "a": X}, student(X, b))):
        with Distill(student, teacher, alpha=1.0, features={"pair": 1.0}) as distill:
            output = student(X, b)
            told, learned = teacher.fc(X), student.fc(X)
            relative = (learned - told).square().sum() / told.square().sum()
            expected = distillation_loss(output, teacher(X, b), 4.0) + relative
            assert torch.allclose(distill(output, torch.tensor(0.0), inputs), expected)


def test_under_autocast_the_loss_is_of_full_precision():
    student = net()
    with Distill(student, features={"0": 1.0}) as distill, torch.autocast("cpu", torch.bfloat16):
        output = student(X)
        assert output.dtype == torch.bfloat16
        loss = distill(output, F.cross_entropy(output, Y), X)
    assert loss.dtype == torch.float32
    loss.backward()
    assert student[0].weight.grad.abs().sum() > 0


def test_a_compiled_student_is_tapped_in_one_graph():
    student, teacher = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), net()
    losses = []
    for compiled in (False, True):
        model = torch.compile(student, backend="eager", fullgraph=True) if compiled else student
        with Distill(model, teacher, features={"0": 1.0}) as distill:
            student.zero_grad()
            output = model(X)
            loss = distill(output, F.cross_entropy(output, Y), X)
            loss.backward()
        losses.append((loss.detach(), student[0].weight.grad.clone()))
    torch.compiler.reset()
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_student_in_ddp_is_tapped_like_a_plain_one(process_group):
    teacher, found = net(), []
    for wrapped in (False, True):
        torch.manual_seed(5)
        student = net()
        model = nn.parallel.DistributedDataParallel(student) if wrapped else student
        with Distill(model, teacher, features={"0": 1.0}) as distill:
            output = model(X)
            distill(output, F.cross_entropy(output, Y), X).backward()
        found.append([p.grad for p in student.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_copies_of_the_student_keep_nothing_of_its_distillation():
    student = net()
    with Distill(student, features={"0": 1.0}) as distill:
        average = copy.deepcopy(student)
        average(X)
        with pytest.raises(DataError, match="'0' gave no tensor since the last call"):
            distill(average(X), torch.tensor(0.0), X)
        taps = [hook for module in average.modules() for hook in module._forward_hooks.values()]
        assert [tap.seen for tap in taps] == [None]


def test_every_step_needs_a_forward_of_its_own_with_gradients():
    student = net()
    with Distill(student, net(), features={"4": 1.0}) as distill:
        output = student(X)
        distill(output, output.sum(), X)
        with pytest.raises(DataError, match="student's module '4' gave no tensor"):
            distill(output, output.sum(), X)
        with torch.no_grad():
            student(X)
        with pytest.raises(DataError, match="did not run, or without gradients"):
            distill(output, output.sum(), X)


def test_features_of_different_shapes_are_named():
    student, teacher = net(5), net(7)
    with Distill(student, teacher, features={"1": 1.0}) as distill:
        output = student(X)
        with pytest.raises(DataError, match=r"outputs of '1' are of shape \(6, 5\) from the student and \(6, 7\)"):
            distill(output, output.sum(), X)
    assert hooks(teacher) == 0


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"temperature": 0.0}, "expected more than 0"),
        ({"alpha": 1.5}, "from 0 to 1"),
        ({"alpha": float("nan")}, "from 0 to 1"),
        ({"features": {"9": 1.0}}, "'9', which is no module of the student, a Sequential"),
        ({"features": {"0": -1.0}}, "'0' has weight -1.0; expected a number above 0"),
        ({"features": {"3": 1.0}, "teacher": nn.Linear(4, 3)}, "'3', which is no module of the teacher, a Linear"),
    ],
)
def test_wishes_that_cannot_be(wishes, words):
    student = net()
    with pytest.raises(SpecError, match=words):
        Distill(student, **wishes)
    assert hooks(student) == 0


def test_students_that_cannot_be_copied_or_hooked():
    student = net()
    with pytest.raises(SpecError, match="teacher is the student itself"):
        Distill(student, student)
    with pytest.raises(SpecError, match="use DDP"):
        Distill(nn.DataParallel(student), features={"0": 1.0})
