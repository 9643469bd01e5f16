# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' sources on the CPU (emulated_cuda.py) against the float64 reference, with a GPU's tests."""

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated_cuda
import pytest
import test_cuda_renderer as renderer
import test_row_adam_cuda as row_adam
import test_tiers as tiers
import torch

from igae.kernels import LIBRARIES
from igae.rendering import build
from igae.rendering.rays import box_range, pixel_rays
from igae.scenes import row_adam_cuda

pytestmark = pytest.mark.skipif(emulated_cuda.unavailable() is not None, reason=str(emulated_cuda.unavailable()))

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[emulated_cuda.Library]:
    """Lets kernels run on tensors of the CPU."""
    for name, value in {"folder": folder, "reverse": False, "launched": set()}.items():
        monkeypatch.setattr(emulated_cuda.Library, name, value, raising=False)
    monkeypatch.setitem(LIBRARIES, "cpu", emulated_cuda.Library)
    return emulated_cuda.Library


@pytest.fixture
def emulated(
    library: type[emulated_cuda.Library], monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[emulated_cuda.Library]]:
    """Lets tests of the renderer run on the CPU."""
    monkeypatch.setattr(renderer, "DEVICE", "cpu")
    yield library
    assert "render_forward" in library.launched


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("fp16 fp32", {}),
    "box of 64": ("fp16 fp32", {"views": 2, "size": (4, 4)}),
    "product": ("fp32", {}),
    "published": ("fp16", {}),
    "coarse only": ("fp16", {}),
    "uneven": ("fp16 fp32", {}),
    "many": ("fp16", {"views": 2}),
    "four colors": ("fp16", {}),
    "dense": ("fp16", {"size": (7, 9)}),
    "areas": ("fp16 fp32", {"size": (2, 3), "views": 2}),
    "distortion": ("fp16 fp32", {}),
    "distortion of areas": ("fp16 fp32", {"size": (2, 3), "views": 2}),
    "distortion coarse only": ("fp32", {}),
    "areas at the border": ("fp16 fp32", {"size": (3, 3), "views": 3}),
}


@pytest.mark.parametrize(
    ("name", "precision"), [(name, precision) for name, (some, _) in CASES.items() for precision in some.split()]
)
def test_images_and_gradients_equal_the_reference(
    emulated: type[emulated_cuda.Library], name: str, precision: str
) -> None:
    # Measured, the largest of all cases: fp32 1.3e-6 and 8.4e-6; fp16 2.1e-4 and 7e-4 (dense 1.7e-3).
    args = renderer.setup(**{**renderer.CASES[name], "size": (3, 3), **CASES[name][1]}, precision=precision)
    for emulated.reverse in (False, True):
        renderer.check(renderer.errors(args, seed=5), *((1e-5, 1e-4) if precision == "fp32" else (2e-3, 2e-3)))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradients_of_any_size_are_as_exact(scale: float) -> None:
    renderer.test_gradients_of_any_size_are_as_exact("default", scale)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradients_of_distortion_alone_of_any_size_are_as_exact(scale: float) -> None:
    renderer.test_gradients_of_distortion_alone_of_any_size_are_as_exact(scale)


@pytest.mark.usefixtures("emulated")
def test_gradients_of_very_different_size() -> None:
    renderer.test_gradients_of_very_different_size()


@pytest.mark.usefixtures("emulated")
def test_rays_that_miss_do_not_count() -> None:
    renderer.test_rays_that_miss_do_not_count(1e8)


@pytest.mark.usefixtures("emulated")
def test_small_products_are_exact() -> None:
    renderer.test_small_products_are_exact(1e-3)


@pytest.mark.usefixtures("emulated")
def test_an_infinite_weight_is_seen() -> None:
    renderer.test_an_infinite_weight_is_seen()


@pytest.fixture
def small(emulated: type[emulated_cuda.Library], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images for tests that do not say how large they are."""
    setup = renderer.setup
    monkeypatch.setattr(renderer, "setup", lambda **options: setup(**{"size": (3, 3), "views": 2, **options}))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("name", "precision"), [("few", "fp32"), ("uneven", "fp16")])
def test_features_that_are_not_kept_are_read_again(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(renderer.CASES, name, {**renderer.CASES[name], "size": (2, 2), "views": 2})
    renderer.test_features_that_are_not_kept_are_read_again(name, precision, monkeypatch)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nan_in_planes_is_seen(precision: str) -> None:
    renderer.test_nan_in_planes_is_seen(precision)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_planes_give_finite_numbers(scale: float) -> None:
    renderer.test_extreme_planes_give_finite_numbers(scale)


@pytest.mark.usefixtures("small")
def test_gradients_of_one_result_only() -> None:
    renderer.test_gradients_of_one_result_only()


@pytest.mark.usefixtures("small")
def test_rays_that_miss_are_background() -> None:
    renderer.test_rays_that_miss_are_background()


@pytest.mark.usefixtures("emulated")
def test_jitter_is_that_of_the_reference() -> None:
    args = renderer.setup(precision="fp32", size=(2, 2), views=2)
    for how in ({}, {"seed": -7}, {"seed": torch.tensor(2**40 + 3)}):
        renderer.check(renderer.errors(args, **how), 1e-5, 1e-4)  # measured 5.8e-7 and 2.3e-6


@pytest.mark.usefixtures("emulated")
def test_jitter_of_areas_is_that_of_the_reference() -> None:
    args = renderer.setup(precision="fp32", size=(2, 2), views=2, rays_per_pixel=2, distortion=True)
    for how in ({}, {"seed": -7}, {"seed": torch.tensor(2**40 + 3)}):
        renderer.check(renderer.errors(args, **how), 1e-5, 1e-4)  # measured 4.8e-7 and 2.4e-6


def test_pixels_at_the_border_of_the_box_have_rays_of_both_kinds() -> None:
    args = renderer.setup(
        **{**renderer.CASES["areas at the border"], **CASES["areas at the border"][1], "device": "cpu"}
    )
    near, far = box_range(*pixel_rays(args["cameras"], torch.float64, 3), args["options"].box)
    hits = (near < far).view(-1, 9).sum(1)
    assert (hits == 0).any() and ((hits > 0) & (hits < 9)).any()


@pytest.mark.parametrize("side", [1, 2])
def test_deterministic_gradients_are_the_same_bits_in_another_order(
    emulated: type[emulated_cuda.Library], side: int
) -> None:
    size = (4 // side, 4 // side)
    args = renderer.setup(
        scenes=1,
        views=2,
        size=size,
        resolution=16,
        deterministic=True,
        precision="fp32",
        rays_per_pixel=side,
        distortion=side == 2,
    )
    found = []
    for emulated.reverse in (False, True):
        found.append(renderer.gradients(args, seed=1, backend="cuda")[0]["g_planes"])
    assert torch.equal(*found)
    renderer.check(renderer.errors(args, seed=1), 1e-5, 1e-4)  # measured 2.5e-7 and 9.4e-7


@pytest.fixture
def emulated_adam(
    library: type[emulated_cuda.Library], monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[emulated_cuda.Library]]:
    """Lets tests of the row Adam run on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(row_adam, "DEVICE", "cpu")
    yield library
    assert {"plan", "begin"} < library.launched


@pytest.fixture
def all_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags and rates are left for the kernels to read."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)


@pytest.mark.usefixtures("emulated_adam")
def test_rows_move_as_on_the_cpu_and_under_dense_adam() -> None:
    row_adam.test_rows_move_as_on_the_cpu_and_under_dense_adam()


@pytest.mark.parametrize(("size", "offset"), [(3, 0), (2049, 0), (4100, 0), (4100, 1)])
def test_rows_of_any_size(emulated_adam: type[emulated_cuda.Library], size: int, offset: int) -> None:
    for emulated_adam.reverse in (False, True):
        row_adam.test_rows_of_any_size(size, offset)


@pytest.mark.usefixtures("emulated_adam")
def test_a_visit_leaves_rows_as_they_are_and_a_step_makes_what_they_owe() -> None:
    row_adam.test_a_visit_leaves_rows_as_they_are_and_a_step_makes_what_they_owe()


@pytest.mark.usefixtures("emulated_adam")
def test_padding_is_no_row() -> None:
    row_adam.test_padding_is_no_row()


@pytest.mark.usefixtures("emulated_adam", "all_on_the_device")
def test_a_step_that_is_not_to_be_made_changes_nothing() -> None:
    row_adam.test_a_step_that_is_not_to_be_made_changes_nothing(torch.bool)


@pytest.mark.usefixtures("emulated_adam", "all_on_the_device")
def test_the_rate_may_be_on_the_device() -> None:
    row_adam.test_the_rate_may_be_on_the_device(torch.float64)


# --- the emulator itself ---

PTX = """
struct Params { int *out; };
extern "C" __global__ void __launch_bounds__(64) part(const Params p) {
  int x = 1;
  asm volatile("%s" : "+r"(x));
  p.out[threadIdx.x] = x;
}
"""
FAULTS = """
struct Params { int *out, fault; };
extern "C" __global__ void __launch_bounds__(64) part(const Params p) {
  extern __shared__ int shared[];
  __shared__ int first[64];
  int me = threadIdx.x;
  shared[me] = first[me] = me;
  if (p.fault == 1 && me == 3) return;
  if (p.fault == 2 && me == 40) __trap();
  if (p.fault == 3) shared[64] = 0;
  if (p.fault == 4) p.out[0] = (int)__ldg((const long long *)(p.out + 1));
  if (p.fault == 5) p.out[1ll << 44] = 0;
  __syncthreads();
  int other = __shfl_xor_sync(~0u, me ^ 1, 1);
  p.out[me] = 1000 * shared[63 - me] + 10 * __popc(__ballot_sync(~0u, me & 1)) + (first[me] == other);
}
"""


class Params(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), ("fault", ctypes.c_int)]


def test_ptx_that_is_not_known_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "part.cu"
    source.write_text(PTX % "brev.b32 %0, %0;")
    with pytest.raises(ValueError, match=r"does not know 'brev.b32 %0, %0;': add it to INSTRUCTIONS"):
        emulated_cuda.compiled(source, {}, tmp_path)


def test_faults_of_a_kernel_are_errors(library: type[emulated_cuda.Library], tmp_path: Path) -> None:
    source = tmp_path / "part.cu"
    source.write_text(FAULTS)
    kernels = library(source, {}, CPU, ["part"], 4 * 64)
    out = torch.zeros(64, dtype=torch.int32)

    def go(fault: int) -> None:
        kernels.launch("part", 2, 64, Params(out.data_ptr(), fault))

    for library.reverse in (False, True):
        out.zero_()
        go(0)
        assert out.tolist() == [1000 * (63 - i) + 161 for i in range(64)]
        faults = ("threads wait for others", "in a trap", "past its end", "no multiple of", "where there is none")
        for fault, message in enumerate(faults, 1):
            with pytest.raises(RuntimeError, match=message):
                go(fault)


def test_all_kernels_are_found() -> None:
    for source, count in (
        (build.SOURCES / "forward.cu", 1),
        (build.SOURCES / "backward.cu", 1),
        (row_adam_cuda.SOURCE, 6),
    ):
        assert emulated_cuda.entries(source.read_text()).count("emulate_") == count


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_rows_that_move_have_the_bits_of_those_that_stay(
    emulated_adam: type[emulated_cuda.Library], tmp_path: Path, tier: str
) -> None:
    rng, scenes = random.Random(0), range(tiers.COUNT)
    for slots in (3, 5, 8):
        plan: list[Any] = []
        for _ in range(25):
            what = rng.choice(["step"] * 5 + ["prefetch", "read", "catch_up", "save", "resume"])
            several = [rng.sample(scenes, rng.randint(1, 3))] if what in ("step", "prefetch", "read") else []
            plan.append((what, *several, *([rng.random() < 0.9] if what in ("step", "read") else [])))
        tiers.compare(plan, tier, slots, str(tmp_path), "cuda")
    assert {"update4", "catch_up4"} <= emulated_adam.launched
