"""
Tests of cyclegan.py and prepare_celeba.py, the proof against the official code, the benchmark.

  pytest                                           all tests; no GPU and no network needed
  python test_cyclegan.py --official DIR           compares with a clone of the official code
  python test_cyclegan.py --bench --size 128       times cyclegan.py and the textbook step
  python test_cyclegan.py --gpu                    benchmark and profile on a CUDA device
"""
import argparse
import contextlib
import csv
import functools
import io
import itertools
import math
import multiprocessing.forkserver
import operator
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import run as torchrun
from torch.nn.utils.parametrizations import spectral_norm

import cyclegan
import prepare_celeba

ROOT = Path(__file__).resolve().parent
CELEBA = ROOT / "../shared/data/celeba"
SMALL = "--size 32 --load_size 36 --ngf 2 --ndf 2 --blocks 1 --device cpu --no-compile"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """These networks are too small for more threads. Processes started here inherit it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(ROOT)
    torch.set_num_threads(1)
    multiprocessing.forkserver.ensure_running()     # imports torch while the first tests run

def flags(words=""):
    """-> the flags of a training run on folders that nobody looks into."""
    return cyclegan.get_args(f"--dataA a --dataB b {words}".split())

def run(words):
    return cyclegan.main(words.split())

def random_images(n, size, dtype=torch.float64, seed=0):
    """-> real_A, real_B: (n, 3, size, size) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, n, 3, size, size, generator=generator, dtype=dtype) * 2 - 1)

def distance(xs, ys):
    """-> ||x - y|| / ||y|| over two lists of tensors."""
    x, y = [torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (xs, ys)]
    return float((x - y).norm() / y.norm())

def write_images(folder, n, square=None, size=(40, 34), seed=0):
    """Writes n PNGs of noise into a folder, each with a colored square if a color is given."""
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = rng.integers(90, 150, (size[1], size[0], 3), dtype=np.uint8)
        if square is not None:
            x = rng.integers(2, size[0] - 18)
            y = rng.integers(2, size[1] - 18)
            pixels[y:y + 16, x:x + 16] = square
        Image.fromarray(pixels).save(f"{folder}/{i:03}.png")

@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder to work in, with a/ (5 images) and b/ (7 images)."""
    monkeypatch.chdir(tmp_path)
    write_images("a", 5, seed=1)
    write_images("b", 7, seed=2)
    return tmp_path

# ---- The textbook step ---------------------------------------------------------------------------
# The paper on a blackboard: PyTorch's own layers, one call for each arrow of its Figure 3, six
# passes through the generators, nothing merged. It is what the tests compare cyclegan.py with, and
# the baseline of the benchmark. Its layers come in the same order as those of cyclegan.py.
def textbook_up(n_in, n_out, args):
    if args.upsample == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(n_in, n_out, 3, padding=1))
    if args.generator == "unet":
        return nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1)
    return nn.ConvTranspose2d(n_in, n_out, 3, stride=2, padding=1, output_padding=1)

class TextbookResidual(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(n, n, 3), nn.InstanceNorm2d(n), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(n, n, 3), nn.InstanceNorm2d(n))

    def forward(self, x):
        return x + self.layers(x)

def textbook_resnet(args):
    """§7.2: c7s1-64, d128, d256, R256 for each block, u128, u64, c7s1-3."""
    n = args.ngf
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, n, 7), nn.InstanceNorm2d(n), nn.ReLU()]
    for k in (n, 2 * n):
        layers += [nn.Conv2d(k, 2 * k, 3, 2, padding=1), nn.InstanceNorm2d(2 * k), nn.ReLU()]
    for _ in range(args.blocks):
        layers += [TextbookResidual(4 * n)]
    for k in (4 * n, 2 * n):
        layers += [textbook_up(k, k // 2, args), nn.InstanceNorm2d(k // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(n, 3, 7), nn.Tanh())

class TextbookUNet(nn.Module):
    """pix2pix (Isola et al. 2017, §6.1): C64, C128, C256, C512, ... while the side is even."""
    def __init__(self, args):
        super().__init__()
        n_levels = max(k for k in range(9) if args.size % 2**k == 0)
        widths = [3] + [args.ngf * min(2**k, 8) for k in range(n_levels)]
        self.downs = nn.ModuleList()
        for k in range(n_levels):
            self.downs.append(nn.Conv2d(widths[k], widths[k + 1], 4, stride=2, padding=1))
        self.ups = nn.ModuleList([textbook_up(widths[-1], widths[-2], args)])
        for k in range(n_levels - 1, 0, -1):
            self.ups.append(textbook_up(2 * widths[k], widths[k - 1], args))

    def forward(self, x):
        skips = [self.downs[0](x)]
        for down in self.downs[1:-1]:
            skips.append(F.instance_norm(down(F.leaky_relu(skips[-1], 0.2))))
        x = self.downs[-1](F.leaky_relu(skips[-1], 0.2))
        x = self.ups[0](F.relu(x))
        for up in self.ups[1:]:
            x = torch.cat([skips.pop(), F.instance_norm(x)], dim=1)
            x = up(F.relu(x))
        return torch.tanh(x)

def textbook_patchgan(args):
    """§7.2: C64, C128, C256, C512, and a score for each patch."""
    n = args.ndf
    layers = [nn.Conv2d(3, n, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for k, stride in ((n, 2), (2 * n, 2), (4 * n, 1)):
        layers += [nn.Conv2d(k, 2 * k, 4, stride, 1), nn.InstanceNorm2d(2 * k), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8 * n, 1, 4, stride=1, padding=1))

def textbook_gan_loss(name, scores, is_real):
    """Least squares (Mao et al.), cross-entropy (Eq. 1), focal (Lin et al.), GHM-C (Li et al.)."""
    if name == "lsgan":
        return ((scores - int(is_real)) ** 2).mean()
    p = torch.sigmoid(scores if is_real else -scores)       # probability of the right answer
    entropy = -torch.log(p)
    if name == "bce":
        return entropy.mean()
    if name == "focal":
        return ((1 - p) ** 2 * entropy).mean()
    bins = (10 * (1 - p)).floor()
    means = [entropy[bins == k].mean() for k in bins.unique()]
    return sum(means) / len(means)

def copy_weights(source, target):
    with torch.no_grad():
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs)

class Textbook(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        Generator = TextbookUNet if args.generator == "unet" else textbook_resnet
        self.G = nn.ModuleList([Generator(args), Generator(args)])
        self.D = nn.ModuleList([textbook_patchgan(args), textbook_patchgan(args)])
        self.G_AB, self.G_BA = self.G
        self.D_A, self.D_B = self.D
        self.adam_G = torch.optim.Adam(self.G.parameters(), args.lr, (args.beta1, 0.999))
        self.adam_D = torch.optim.Adam(self.D.parameters(), args.lr, (args.beta1, 0.999))
        self.pool_A, self.pool_B = [], []

    def load(self, model):
        """Takes over weights, precision and device of a cyclegan.CycleGAN."""
        self.to(next(model.parameters()))
        copy_weights(model, self)
        return self

    def generator_loss(self, real_A, real_B):
        """Eq. 3 and the identity term of §5.2."""
        fake_B = self.G_AB(real_A)
        fake_A = self.G_BA(real_B)
        rec_A = self.G_BA(fake_B)
        rec_B = self.G_AB(fake_A)
        name = "lsgan" if self.args.gan_loss == "lsgan" else "bce"      # focal, GHM: for D only
        terms = {"adv_AB": textbook_gan_loss(name, self.D_B(fake_B), is_real=True),
                 "adv_BA": textbook_gan_loss(name, self.D_A(fake_A), is_real=True),
                 "cycle_A": self.args.lambda_cycle * F.l1_loss(rec_A, real_A),
                 "cycle_B": self.args.lambda_cycle * F.l1_loss(rec_B, real_B)}
        if self.args.lambda_identity > 0:
            weight = self.args.lambda_cycle * self.args.lambda_identity
            terms["idt_A"] = weight * F.l1_loss(self.G_BA(real_A), real_A)
            terms["idt_B"] = weight * F.l1_loss(self.G_AB(real_B), real_B)
        return terms, fake_A.detach(), fake_B.detach()

    def discriminator_loss(self, real_A, real_B, fake_A, fake_B):
        """Eq. 1, halved (§7.1)."""
        loss = 0
        for D, real, fake in ((self.D_A, real_A, fake_A), (self.D_B, real_B, fake_B)):
            loss = loss + textbook_gan_loss(self.args.gan_loss, D(real), is_real=True) / 2
            loss = loss + textbook_gan_loss(self.args.gan_loss, D(fake), is_real=False) / 2
        return loss

    def step(self, real_A, real_B):
        """-> both losses, before their updates."""
        terms, fake_A, fake_B = self.generator_loss(real_A, real_B)
        loss_G = sum(terms.values())
        self.adam_G.zero_grad()
        loss_G.backward(inputs=[*self.G.parameters()])
        self.adam_G.step()
        fake_A = cyclegan.query_pool(self.pool_A, self.args.pool_size, fake_A)
        fake_B = cyclegan.query_pool(self.pool_B, self.args.pool_size, fake_B)
        loss_D = self.discriminator_loss(real_A, real_B, fake_A, fake_B)
        self.adam_D.zero_grad()
        loss_D.backward(inputs=[*self.D.parameters()])
        self.adam_D.step()
        return [loss_G.detach(), loss_D.detach()]

# ---- Flags ---------------------------------------------------------------------------------------
NUMBERS = [name for name, value in vars(flags()).items() if type(value) in (int, float)]

def refusal(words, capsys, program=cyclegan):
    """Runs a command line that must end with one line on stderr and status 2 -> the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        program.main(words.split())
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{program.__name__}.py: ")
    return line

def test_help_begins_with_the_commands_and_states_every_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    text = capsys.readouterr().out
    groups = re.findall(r"^([a-z]+):$", text, re.M)
    assert text.index("python cyclegan.py --demo") < text.index("options:")
    assert groups == "options run data networks objective schedule speed output translate".split()
    defaults = vars(cyclegan.get_args([]))
    entries = text.split("\n  --")[1:]
    assert len(entries) == len(defaults)
    for entry in entries:
        name = re.match(r"\w+", entry).group()
        assert defaults[name] is None or "(default:" in entry, name

@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_refused_outside_its_range(name, capsys):
    values = ["x", "-1", "nan"]
    if name in "ngf ndf batch_size log_every sample_every save_every".split():
        values += ["0"]
    for value in values:
        assert f"--{name}" in refusal(f"--dataA a --dataB b --{name}={value}", capsys)

def test_the_load_size_follows_the_size_unless_it_is_typed():
    assert (flags("--size 128").load_size, flags("--load_size 260").load_size) == (143, 260)

def test_a_run_is_named_after_its_data():
    args = cyclegan.get_args("--dataA x/horse2zebra/trainA --dataB x/horse2zebra/trainB".split())
    assert args.out_dir == os.path.abspath("runs/horse2zebra")
    assert flags().out_dir == os.path.abspath("runs/a2b")

def test_a_path_becomes_absolute_and_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    args = cyclegan.get_args(["--dataA", "~/a", "/x/../b", "--out_dir=~/run"])
    assert [*args.dataA, args.out_dir] == ["/me/a", "/b", "/me/run"]

# ---- Images --------------------------------------------------------------------------------------
def levels_apart(image, other):
    return np.abs(np.array(image, float) - np.array(other)).max()

def test_images_are_found_in_all_folders_but_hidden_files_are_not(tmp_path, capsys):
    images = {"A B.JPG": "A B", "sub/x.y.webp": "sub/x.y", "ü [1]/☃.tiff": "ü [1]/☃"}
    for name in [*images, ".z.png", ".h/z.png", "notes.txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    os.symlink(".", tmp_path / "link")          # not followed: this one would never end
    found = cyclegan.find_images([tmp_path], "out")
    assert found == {tmp_path / name: Path(short) for name, short in images.items()}
    assert list(found) == sorted(found) and "skipped 1 files" in capsys.readouterr().out

@pytest.mark.parametrize("name", ["L.png", "LA.png", "RGBA.png", "CMYK.jpg"])
def test_an_image_is_read_as_rgb_without_its_transparency(tmp_path, name):
    Image.new("RGBA", (9, 9), "#99999940").convert(name[:-4]).save(tmp_path / name)
    image = cyclegan.read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert levels_apart(image, Image.new("RGB", (9, 9), "#999999")) <= 2

@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_an_image_is_rotated_as_its_exif_data_says(tmp_path, name):
    upright = Image.new("RGB", (48, 32))
    upright.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x112] = 6                             # rotate it clockwise
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / name, exif=exif.tobytes(), lossless=True)
    assert levels_apart(cyclegan.read_image(tmp_path / name), upright) <= 2

@pytest.mark.parametrize("name", ["I;16.png", "I.tif", "F.tif"])
def test_an_image_of_more_than_8_bits_is_skipped_by_name(tmp_path, capsys, name):
    path = tmp_path / name
    Image.new(name[:-4], (9, 9)).save(path)
    assert cyclegan.read_image(path) is None
    assert re.search(f"{path}.*8 bits", capsys.readouterr().err)

# ---- Preprocessing and order ---------------------------------------------------------------------
@pytest.mark.parametrize("width, height", [(500, 40), (3, 900)])
def test_preprocessing_resizes_then_crops_the_center(width, height):
    image = Image.effect_noise((width, height), 60).convert("RGB")
    shorter = min(width, height)
    sizes = {"stretch": (32, 32), "crop": (32 * width // shorter, 32 * height // shorter)}
    for resize, (w, h) in sizes.items():
        resized = image.resize((w, h), Image.Resampling.BICUBIC)
        x, y = round((w - 32) / 2), round((h - 32) / 2)
        expected = resized.crop((x, y, x + 32, y + 32))
        result = cyclegan.preprocess(image, flags(f"{SMALL} --resize {resize}"))
        assert np.array_equal(result.permute(1, 2, 0), expected)

@pytest.mark.parametrize("words, width", [
    ("--native", 36), ("--no-flip", 36), ("--resize crop", 43)])
def test_augmentation_crops_at_random_and_mirrors_half_of_the_images(words, width):
    args = flags(f"{SMALL} {words}")
    image = Image.effect_noise((60, 50), 60).convert("RGB")
    resized = np.array(image.resize((width, 36), Image.Resampling.BICUBIC))
    windows = np.concatenate(np.lib.stride_tricks.sliding_window_view(resized, (32, 32), (0, 1)))
    plain = {window.tobytes() for window in windows}
    mirrored = {window[..., ::-1].tobytes() for window in windows}
    torch.manual_seed(0)
    crops = [cyclegan.preprocess(image, args, True).numpy().tobytes() for _ in range(1000)]
    assert set(crops) == (plain | mirrored if args.flip else plain)
    assert abs(sum(crop in mirrored for crop in crops) - 500 * args.flip) < 60

@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_is_a_function_of_seed_and_place_alone(data, workers):
    args = flags(f"{SMALL} --workers {workers}")
    images = cyclegan.UnpairedImages(args)
    images.paths_B = images.paths_B[:1]         # so that only its crops differ
    torch.manual_seed(workers)                  # must not matter
    for step, *batch in cyclegan.load_batches(images, 2, 8, cyclegan.Runtime(args)):
        item = torch.stack(images[step - 1])
        assert torch.equal(torch.cat(batch), item / 127.5 - 1)
    assert not torch.equal(item[1], images[step - 2][1])
    args.seed = 1
    assert not torch.equal(item[1], images[step - 1][1])

def test_every_lap_shows_each_image_once_in_a_new_order(data):
    for i in range(8):
        for folder in "ab":
            Image.new("L", (9, 9), 20 * i).save(f"{folder}/{i:03}.png")
    images = cyclegan.UnpairedImages(flags(SMALL))
    laps = []
    for domain in (0, 1):
        for start in (0, 8):
            lap = [int(images[n][domain].max()) for n in range(start, start + 8)]
            assert sorted(lap) == list(range(0, 160, 20))
            assert lap not in laps              # nor does B follow the order of A
            laps.append(lap)

# ---- The networks --------------------------------------------------------------------------------
each_generator = pytest.mark.parametrize("generator", ["resnet", "unet"])

def make_pair(words):
    """-> a small cyclegan.CycleGAN in float64, and a Textbook with the same weights."""
    args = flags(f"--size 32 --ngf 3 --ndf 3 --blocks 1 --lambda_cycle 7 --no-compile {words}")
    model = cyclegan.CycleGAN(args).double()
    for parameter in model.parameters():    # N(0, 0.02) leaves networks this small too flat to test
        nn.init.normal_(parameter, 0, 0.2)
    return model, Textbook(args).load(model)

@pytest.mark.parametrize("Network, words, n_parameters", [
    (cyclegan.ResNetGenerator, "", 11_378_179), (cyclegan.UNetGenerator, "", 54_409_603),
    (cyclegan.ResNetGenerator, "--size 128", 7_837_699),
    (cyclegan.PatchDiscriminator, "", 2_764_737)])
def test_networks_have_as_many_parameters_as_documented(Network, words, n_parameters):
    with torch.device("meta"):
        network = Network(flags(words))
    assert sum(parameter.numel() for parameter in network.parameters()) == n_parameters
    assert f"{n_parameters:,}" in Network.__doc__

@each_generator
@pytest.mark.parametrize("size", [32, 64, 96, 256])
@torch.no_grad()
def test_networks_of_any_size_equal_the_textbooks(generator, size):
    model, book = make_pair(f"--generator {generator} --size {size}")
    images, _ = random_images(2, size)
    assert distance([model.G_AB(images)], [book.G_AB(images)]) < 1e-10
    assert model.D_A(images).shape == (2, 1, size // 8 - 2, size // 8 - 2)

def test_a_score_sees_70x70_pixels():
    D = cyclegan.PatchDiscriminator(flags("--ndf 2"))
    layers = [layer for layer in D if not isinstance(layer, cyclegan.InstanceNorm)]     # sees all
    image = torch.rand(1, 3, 256, 256, requires_grad=True)
    nn.Sequential(*layers)(image)[0, 0, 15, 15].backward()
    is_seen = (image.grad != 0).any(dim=1)
    assert is_seen.any(dim=1).sum() == is_seen.any(dim=2).sum() == 70

def test_initial_weights_are_normal_with_deviation_0_02():
    model = cyclegan.CycleGAN(flags("--size 64 --no-compile"))
    normalized = spectral_norm(nn.Conv2d(64, 128, 4))       # as a fork might do
    cyclegan.init_weights(normalized)
    for network in (model.G_AB, model.D_B, normalized):
        kernels = [weight.flatten() for weight in network.parameters() if weight.ndim == 4]
        assert abs(torch.cat(kernels).std() - 0.02) < 1e-4 > abs(torch.cat(kernels).mean())
        assert not any(bias.any() for bias in network.parameters() if bias.ndim == 1)

def test_instance_norm_has_the_same_gradients_in_channels_last():
    x, factors = random_images(1, 32)
    x.requires_grad_()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        y = cyclegan.InstanceNorm()(x.contiguous(memory_format=layout))
        results.append(torch.autograd.grad(y, x, factors.contiguous(memory_format=layout)))
    assert distance(*results) < 1e-10

def test_instance_norm_stays_in_bf16_on_cuda():
    with torch._subclasses.FakeTensorMode():        # needs no GPU: its tensors have no values
        x = torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16, device="cuda")
        torch.set_autocast_enabled("cuda", True)
        dtypes = [cyclegan.InstanceNorm()(x).dtype, F.group_norm(x, 2).dtype]
        torch.set_autocast_enabled("cuda", False)
    assert dtypes == [torch.bfloat16, torch.float32]

# ---- The image pool ------------------------------------------------------------------------------
def numbered_fakes(*numbers):
    return torch.tensor(numbers).float().reshape(-1, 1, 1, 1)

@pytest.mark.parametrize("size, stored", [(0, []), (2, [1, 2])])
def test_a_pool_that_is_off_or_not_full_returns_the_fakes_and_keeps_copies(size, stored):
    pool, fakes = [], numbered_fakes(1, 2)
    assert cyclegan.query_pool(pool, size, fakes).flatten().tolist() == [1, 2]
    fakes += 100
    assert [image.item() for image in pool] == stored

def test_a_full_pool_exchanges_each_fake_with_probability_one_half_and_loses_none():
    torch.manual_seed(0)
    pool, fakes = [], numbered_fakes(*range(3, 9003))
    cyclegan.query_pool(pool, 3, numbered_fakes(0, 1, 2))
    returned = cyclegan.query_pool(pool, 3, fakes)
    assert 4300 < (returned != fakes).sum() < 4700
    assert sorted(torch.cat([returned, torch.stack(pool)])) == list(range(9003))

# ---- The objective and the step ------------------------------------------------------------------
each_gan_loss = pytest.mark.parametrize("gan_loss", ["lsgan", "bce", "focal", "ghm"])

def make_trainer(words):
    """-> model, optimizers, pools and runtime: what train_step needs besides images."""
    args = flags(words)
    runtime = cyclegan.Runtime(args)
    model = cyclegan.CycleGAN(args).to(runtime.device)
    return model, cyclegan.make_optimizers(model, args), {"A": [], "B": []}, runtime

def gradients(loss, *networks):
    return torch.autograd.grad(loss, nn.ModuleList(networks).parameters())

@each_generator
@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
@each_gan_loss
@pytest.mark.parametrize("identity", [0, 0.5])
def test_generator_loss_and_gradients_equal_the_textbooks(generator, upsample, gan_loss, identity):
    model, book = make_pair(f"--generator {generator} --upsample {upsample} --gan_loss {gan_loss} "
                            f"--lambda_identity {identity}")
    images = random_images(2, 32)
    loss, terms, *fakes = model.generator_loss(*images)
    book_terms, *book_fakes = book.generator_loss(*images)
    torch.testing.assert_close(terms, book_terms, rtol=1e-10, atol=0)
    assert distance(fakes, book_fakes) < 1e-10
    book_gradients = gradients(sum(book_terms.values()), book.G)
    assert distance(gradients(loss, model.G_AB, model.G_BA), book_gradients) < 1e-10

@each_gan_loss
def test_discriminator_loss_and_gradients_equal_the_textbooks(gan_loss):
    model, book = make_pair(f"--gan_loss {gan_loss}")
    images = [*random_images(2, 32), *random_images(2, 32, seed=3)]
    loss, terms = model.discriminator_loss(*images)
    book_loss = book.discriminator_loss(*images)
    assert distance([loss, terms["D_A"] + terms["D_B"]], [book_loss, book_loss]) < 1e-10
    book_gradients = gradients(book_loss, book.D)
    assert distance(gradients(loss, model.D_A, model.D_B), book_gradients) < 1e-10

@pytest.mark.parametrize("words, dtype, bound", [
    ("cpu --amp off", torch.float64, 1e-10),
    ("cpu --amp off --generator unet --gan_loss focal", torch.float64, 1e-10),
    ("cpu --amp off --lambda_identity 0 --pool_size 0", torch.float64, 1e-10),
    ("cpu --amp bf16", torch.float32, 3e-2),
    pytest.param("cuda --amp off", torch.float32, 3e-2, marks=needs_cuda),
    pytest.param("cuda --amp bf16 --compile", torch.float32, 3e-2, marks=needs_cuda)])
def test_ten_steps_with_pools_follow_the_textbook(words, dtype, bound):
    model, optimizers, pools, runtime = make_trainer(
        f"--size 32 --ngf 6 --ndf 6 --blocks 1 --pool_size 3 --no-compile --device {words}")
    book = Textbook(runtime.args).load(model.to(dtype))
    losses, book_losses = [], []
    for step in range(1, 11):
        images = [image.to(runtime.device) for image in random_images(2, 32, dtype, seed=step)]
        terms = cyclegan.train_step(model, optimizers, pools, runtime, *images, step)
        loss_D = terms.pop("D_A") + terms.pop("D_B")
        losses += [sum(terms.values()), loss_D]
        cyclegan.seed_torch(0, step, 0)         # as train_step does; the pools draw
        book_losses += book.step(*images)
    assert distance(losses, book_losses) < bound

# ---- The learning rate, compiled networks, and networks that a fork adds -------------------------
def test_the_learning_rate_is_constant_then_falls_linearly_to_0():
    args = flags("--lr 0.5 --epochs 3 --epochs_decay 2")
    for epoch, lr in {1: 0.5, 3.5: 0.375, 5: 0}.items():
        assert cyclegan.lr_at(epoch, args) == pytest.approx(lr)

def test_a_compiled_run_is_the_same(data, monkeypatch):
    """Whole networks, in four graphs: G for two images or for one, D frozen or not."""
    compiler = CompileCounterWithBackend("eager")
    compile_cheaply = functools.partialmethod(nn.Module.compile, backend=compiler)
    monkeypatch.setattr(nn.Module, "compile", compile_cheaply)
    for choice in ("compile", "no-compile"):
        run(f"{TRAIN} --max_steps 3 --{choice} --out_dir {choice}")
    assert compiler.frame_count == 4
    torch.testing.assert_close(end_of("compile"), end_of("no-compile"), rtol=1e-3, atol=1e-3)

def test_a_frozen_network_that_a_fork_adds_is_not_initialized_trained_or_saved(data, monkeypatch):
    judge = nn.Conv2d(3, 1, 1).requires_grad_(False)
    before = judge.weight.clone()
    class Fork(cyclegan.CycleGAN):
        def __init__(self, args):
            super().__init__(args)
            self.judge = judge
    monkeypatch.setattr(cyclegan, "CycleGAN", Fork)
    run(f"{SMALL} --dataA a --dataB b --out_dir x --max_steps 2")
    assert torch.equal(judge.weight, before)
    assert b"judge" not in Path("x/latest.pt").read_bytes()

def test_a_trainable_network_without_an_optimizer_fails_loudly():
    model = cyclegan.CycleGAN(flags(SMALL))
    model.judge = nn.Conv2d(3, 1, 1)
    with pytest.raises(AssertionError, match="no optimizer"):
        cyclegan.make_optimizers(model, flags(SMALL))

# ---- Runs ----------------------------------------------------------------------------------------
TRAIN = (f"{SMALL} --dataA a --dataB b --out_dir run --amp off --pool_size 3 --log_every 2 "
         "--sample_every 5 --max_steps 30")         # 30: in case that nothing stops it
COLUMNS = "step epoch lr waiting idt_A idt_B cycle_A cycle_B adv_AB adv_BA D_A D_B img/s".split()

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with images, a run of 3 epochs of 4 steps each, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_images("a", 7, seed=1)
        write_images("b", 5, seed=2)
        with open("printed", "w") as file, contextlib.redirect_stdout(file):
            run(f"{TRAIN} --batch_size 2 --epochs 1 --epochs_decay 2 --save_every 3")
    return folder

@pytest.fixture
def work(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

def load(path="run/latest.pt"):
    return torch.load(path, weights_only=True)

def column(name):
    with open("run/log.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]

def end_of(folder):
    """-> all that a run ends with: weights, optimizers and pools, and the log without its times."""
    checkpoint = load(f"{folder}/latest.pt")
    for row in checkpoint["rows"]:
        del row["waiting"], row["img/s"]
    return checkpoint["parts"] | checkpoint["pools"], checkpoint["rows"]

def before_call(patch, name, number, act):
    """Makes call `number` of cyclegan.<name> begin with act(*its arguments), or with a signal."""
    original = operator.attrgetter(name)(cyclegan)
    calls = itertools.count(1)
    def changed(*args, **options):
        if next(calls) == number:
            if isinstance(act, signal.Signals):     # from outside, to all processes of the run
                subprocess.run(f"kill -{act:d} -{os.getpgrp()}", shell=True, start_new_session=True)
            else:
                act(*args)
        return original(*args, **options)
    patch.setattr(f"cyclegan.{name}", changed)

def test_red_squares_become_blue(data):
    write_images("red", 30, (230, 30, 30), size=(32, 32), seed=1)
    write_images("blue", 30, (30, 30, 230), size=(32, 32), seed=2)
    run(f"{SMALL} --dataA red --dataB blue --out_dir run --load_size 32 --ngf 8 --ndf 4 --amp off "
        "--upsample nearest --batch_size 2 --lr 4e-3 --epochs_decay 0 --max_steps 50")
    run("--checkpoint run/generators.pt --input red --output out --device cpu")
    for i in range(4):
        before = np.array(Image.open(f"red/{i:03}.png"), dtype=int)
        after = np.array(Image.open(f"out/{i:03}.png"), dtype=int)
        square = before[..., 0] == 230
        assert (after[square][:, 2] > after[square][:, 0] + 60).mean() > 0.9, "red becomes blue"
        assert np.abs(after - before)[~square].mean() < 45, "the rest stays as it was"

def test_a_run_writes_checkpoints_and_samples_and_prints_its_plan_and_log(work):
    assert set(os.listdir("run")) == {"latest.pt", "generators.pt", "log.csv", "samples"}
    assert load()["pairs_seen"] == 24
    assert load("run/generators.pt")["generators"].keys() == {"G_AB", "G_BA"}
    samples = sorted(os.listdir("run/samples"))
    assert samples == ["step_0000005.png", "step_0000010.png", "step_0000012.png"]
    assert Image.open("run/samples/step_0000012.png").size == (206, 206)     # 6 x 6 images
    plan, head, *rows = Path("printed").read_text().splitlines()
    assert "[7, 5] images" in plan and "12 steps to go" in plan
    assert head.split() == COLUMNS
    assert column("step") == ["2", "3", "4", "6", "8", "9", "10", "12"]     # 3, 9: checkpoints
    assert [row.split()[0] for row in rows[:8]] == column("step")

def test_a_row_of_the_log_holds_the_means_since_the_row_before(data):
    losses = {}
    for n in (1, 2):
        run(f"{TRAIN} --max_steps 4 --log_every {n} --out_dir every_{n}")
        losses[n] = [row["D_A"] for row in load(f"every_{n}/latest.pt")["rows"]]
    assert losses[2] == pytest.approx([np.mean(losses[1][:2]), np.mean(losses[1][2:])])

def test_a_terminal_shows_the_time_left_and_a_cpu_is_too_slow(data, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run(f"{TRAIN} --max_steps 6")
    run(f"{TRAIN} --size 256 --load_size 256 --max_steps 0 --out_dir large")
    text = capsys.readouterr().out
    assert "4/6" not in text and "5/6, 0.00 hours left" in text and "try --size 64" in text

def test_a_locked_log_is_a_warning_and_costs_no_rows(data, monkeypatch, capsys):
    os.makedirs("run/log.csv")
    before_call(monkeypatch, "train_step", 4, lambda *_: os.rmdir("run/log.csv"))
    assert run(f"{TRAIN} --max_steps 4") == 0
    assert capsys.readouterr().out.count("cannot write") == 1
    assert column("step") == ["2", "4"]

# ---- Runs that stop ------------------------------------------------------------------------------
FORKSERVER = multiprocessing.get_context("forkserver")      # imports torch once for all processes
FORKSERVER.set_forkserver_preload(["cyclegan", __name__])

def child(rank, n, port, words, hooks, main):
    """A process that runs main(words), its output in the file out<rank>."""
    os.setpgrp()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(n), RANK=str(rank))
    multiprocessing.set_start_method("fork", force=True)    # for the loader
    for number in (signal.SIGINT, signal.SIGTERM):          # as cyclegan.py does as a program
        signal.signal(number, cyclegan.request_stop)
    with open(f"out{rank}", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if rank == n - 1:
        for hook in hooks:
            before_call(pytest.MonkeyPatch(), *hook)
    sys.exit(main(words.format(rank=rank).split()))

def launch(words, *hooks, n=1, main=cyclegan.main):
    """Runs main(words) in n processes, the last with these before_calls -> statuses, outputs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    processes = []
    for rank in range(n):
        process = FORKSERVER.Process(target=child, args=(rank, n, port, words, hooks, main))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(60)
        process.kill()                  # if it hangs: the test sees the exit status
        process.join()
    outputs = [Path(f"out{rank}").read_text() for rank in range(n)]
    return [process.exitcode for process in processes], outputs

@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_and_killed_anywhere_ends_as_one_that_never_stopped(data, workers):
    words = f"{TRAIN} --epochs 1 --epochs_decay 1 --save_every 4"
    assert run(f"{words} --out_dir whole") == 0
    assert launch(f"{words} --workers {workers}", ("train_step", 2, signal.SIGTERM))[0] == [143]
    # In the middle; before a checkpoint is written; before the second one is; between samples.
    for name, k in [("train_step", 3), ("torch.save", 1), ("os.replace", 3), ("save_samples", 1)]:
        assert launch("--resume run", (name, k, signal.SIGKILL))[0] == [-9]
    assert launch("--resume run --out_dir run/", ("train_step", 2, signal.SIGINT))[0] == [130]
    assert run("--resume run") == 0
    torch.testing.assert_close(end_of("run"), end_of("whole"), rtol=0, atol=0)
    assert len(load()["pools"]["A"]) == 3
    assert column("step") == ["2", "4", "6", "8", "10", "12", "14"]

def say(*_):
    print("in the step", flush=True)

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once_and_ignored_by_the_loader_processes(data, number):
    hooks = [("train_step", 2, say), ("train_step", 2, number)]
    statuses, outputs = launch(f"{TRAIN} --workers 2", *hooks)
    assert statuses == [128 + number]
    events = re.findall("press Ctrl-C again|in the step|--resume", outputs[0])
    assert events == ["press Ctrl-C again", "in the step", "--resume"]
    assert load()["pairs_seen"] == 2

@pytest.mark.parametrize("number, status", [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_a_second_ctrl_c_ends_at_once_but_a_second_sigterm_does_not(data, number, status):
    assert launch(TRAIN, ("train_step", 1, number), ("torch.save", 1, number))[0] == [status]
    assert os.path.exists("run/latest.pt") == (status == 143)

def test_a_thread_other_than_the_main_one_trains_and_translates(data):
    with ThreadPoolExecutor() as threads:
        for words in (f"{TRAIN} --max_steps 1",
                      "--checkpoint run/latest.pt --input b --output out --device cpu"):
            assert threads.submit(run, words).result() == 0

def spoil_images(model, optimizers, pools, runtime, real_A, *_):
    real_A.fill_(math.nan)

def limit_files(*_, size=20000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def refuse(*_):
    raise PermissionError("locked")

@pytest.mark.parametrize("name, number, act, words", [
    ("train_step", 4, spoil_images, "step 4: weights not finite"),
    ("torch.save", 3, limit_files, "latest.pt")])       # the first of the two checkpoints
def test_what_stops_a_run_is_one_line_and_the_last_checkpoint_is_kept(
        data, monkeypatch, capsys, name, number, act, words):
    before_call(monkeypatch, name, number, act)
    line = refusal(f"{TRAIN} --save_every 2", capsys)
    limit_files(size=resource.RLIM_INFINITY)
    assert words in line
    assert load()["pairs_seen"] == 2

def test_a_full_disk_is_one_line_before_training(data, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**5))
    assert "disk full" in refusal(TRAIN, capsys)

def test_a_bug_shows_its_traceback_and_ends_the_saved_run_and_its_workers(data):
    statuses, outputs = launch(f"{TRAIN} --workers 2 --save_every 2", ("write_log", 1, refuse))
    assert statuses == [1] and load()["pairs_seen"] == 2
    assert "Traceback" in outputs[0] and "PermissionError: locked" in outputs[0]

# ---- Runs that continue --------------------------------------------------------------------------
def test_a_finished_run_says_so_and_refuses_flags_that_cannot_act_any_more(work, capsys):
    assert run("--resume run") == 0
    assert " 0 steps to go" in capsys.readouterr().out
    assert "--lambda_cycle was 10.0" in refusal("--resume run --lambda_cycle 5", capsys)

def test_a_run_continues_at_the_same_image_with_another_batch_size(work):
    run("--resume run --epochs 9 --batch_size 4 --max_steps 7")
    assert load()["pairs_seen"] == 7 * 4

@pytest.mark.parametrize("flag", ["--generator unet", "--blocks 2", "--ngf 3", "--ndf 3",
                                  "--size 36", "--upsample nearest", "--seed 1", "--out_dir new"])
def test_what_no_run_can_change_is_refused(work, capsys, flag):
    line = refusal(f"--resume run --epochs 9 {flag}", capsys)
    assert line.startswith(f"cyclegan.py: {flag.split()[0]} was ")

def test_a_run_continues_elsewhere_with_other_images_and_flags(work, capsys):
    os.rename("a", "moved_a")
    write_images("moved_a", 8)          # one more than before
    os.rename("run", "moved")
    for words in ["--epochs_decay 3 --amp bf16 --max_steps 13 --dataA moved_a",
                  "--max_steps 14 --lambda_identity 0 --load_size 40 --pool_size 2",
                  "--max_steps 1000 --lambda_identity 1 --amp off"]:
        assert run(f"--resume moved {words}") == 0
    os.rename("moved", "run")
    assert capsys.readouterr().out.count("the run had [7, 5] images") == 1
    assert column("step")[-4:] == ["13", "14", "15", "16"]
    assert [cell == "" for cell in column("idt_A")[-4:]] == [False, True, False, False]
    rates = [float(cell) for cell in column("lr")[-4:]]
    assert rates == pytest.approx([2e-4 * (1 - k / 12) for k in (8, 9, 10, 11)])

def test_a_checkpoint_that_lacks_a_network_is_one_line(work, capsys):
    checkpoint = load()
    del checkpoint["parts"]["D_A"]
    torch.save(checkpoint, "run/latest.pt")
    assert "another version" in refusal("--resume run --epochs 9", capsys)

def test_a_checkpoint_of_a_gpu_continues_without_one(data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        run(f"{TRAIN} --max_steps 2")
    assert b"cuda:0" in Path("run/latest.pt").read_bytes()
    assert run("--resume run --max_steps 3") == 0

@needs_cuda
def test_a_run_moves_from_cuda_to_the_cpu_and_back(data):
    run(f"{TRAIN} --max_steps 2 --device cuda --no-compile --workers 2")
    run("--resume run --max_steps 4 --device cpu")
    run("--resume run --max_steps 6 --device cuda --compile")
    assert column("step") == ["2", "4", "6"]

# ---- Two processes -------------------------------------------------------------------------------
def five_steps(module, args, runtime):
    """-> outputs (not weights: some biases are noise) after five steps on this process's share."""
    model = module.CycleGAN(args).double()
    optimizers = module.make_optimizers(model, args)
    pools = {"A": [], "B": []}
    for step in range(5):
        pair = [x[runtime.rank::runtime.world_size] for x in random_images(2, 32, seed=step)]
        module.train_step(model, optimizers, pools, runtime, *pair, step)
    x = random_images(1, 32)[0]
    return [network(x) for network in model.networks.values()]

def save_five_steps(words):
    args = cyclegan.get_args(words)
    runtime = cyclegan.Runtime(args)
    torch.save(five_steps(cyclegan, args, runtime), f"{runtime.world_size}{runtime.rank}.pt")

def test_two_processes_step_as_one_with_twice_the_batch(data):
    for n in (1, 2):
        launch(f"{TRAIN} --pool_size 0", n=n, main=save_five_steps)
    assert 0 < distance(load("20.pt"), load("10.pt")) < 1e-10
    assert distance(load("21.pt"), load("20.pt")) == 0

def run_as_program(words):
    sys.argv = ["cyclegan.py", *words]
    runpy.run_path(f"{ROOT}/cyclegan.py", run_name="__main__")

def test_two_processes_share_the_images_stop_together_and_continue_exactly(data):
    words = f"{TRAIN} --pool_size 0 --max_steps 8"      # only the pools of rank 0 are saved
    run(f"{words} --batch_size 2 --out_dir one")
    assert launch(f"{words} --out_dir whole", n=2, main=run_as_program)[0] == [0, 0]
    assert launch(words, ("train_step", 2, signal.SIGTERM), n=2)[0] == [0, 143]
    assert launch("--resume run", n=2) == ([0, 0], [mock.ANY, ""])      # only rank 0 prints
    torch.testing.assert_close(end_of("run"), end_of("whole"), rtol=0, atol=0)
    torch.testing.assert_close(end_of("run")[1], end_of("one")[1], rtol=1e-3, atol=0)

def test_processes_with_other_numbers_of_images_end_instead_of_waiting(data):
    write_images("a1", 6)
    os.rename("a", "a0")
    statuses, outputs = launch(TRAIN.replace("--dataA a", "--dataA a{rank}"), n=2)
    assert statuses == [2, 2]
    assert outputs[1].startswith("cyclegan.py: this process found [6, 7] images of A and B, others")

def test_a_signal_to_torchrun_saves_the_run(data):
    runs = {}
    for sig, n in [(2, 2), (15, 1)]:            # SIGINT, SIGTERM, both at the same time
        words = f"--standalone --nproc_per_node={n} -m cyclegan {TRAIN} --max_steps=5000"
        words = f"{words} --out_dir {sig}"
        Path(f"out{sig}").touch()
        runs[sig] = FORKSERVER.Process(target=child, args=(sig, 1, "", words, [], torchrun.main))
        runs[sig].start()
    for sig, process in runs.items():
        output = Path(f"out{sig}")
        while process.is_alive() and "\n      2 " not in output.read_text():    # the row of step 2
            time.sleep(0.1)
        os.killpg(process.pid, sig)
        process.join()
        assert "python cyclegan.py --resume" in output.read_text()
        assert load(f"{sig}/latest.pt")["pairs_seen"] < 5000

# ---- Bad input -----------------------------------------------------------------------------------
BROKEN = ["cut1.jpg", "cut2.png", "cut3.webp", "deep.png", "empty.jpg", "page.jpg"]
NO_CHECKPOINT = {
    "page": {}, "cut": {}, "list": [1], "numbers": {1: 2}, "old_layout": {"model": {}},
    "classifier": {"0.weight": torch.ones(8, 8, 3, 3)},
    "more": textbook_resnet(flags("--ngf 4 --blocks 1")).state_dict() | {"bias": torch.ones(3)}}

@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Folders of images, the runs resnet and unet, and what is no checkpoint."""
    top = tmp_path_factory.mktemp("top")
    for name in ("bad", *NO_CHECKPOINT):
        (top / name).mkdir()
    write_images(top / "A", 2)
    write_images(top / "B", 2)
    for name in BROKEN[:3]:
        Image.open(top / "B/000.png").save(top / "bad" / name)
        os.truncate(top / "bad" / name, 300)
    Image.new("I;16", (40, 34)).save(top / "bad/deep.png")
    (top / "bad/empty.jpg").touch()
    (top / "bad/page.jpg").write_text("<html>")
    for name, content in NO_CHECKPOINT.items():
        torch.save(content, top / name / "latest.pt")
    (top / "page/latest.pt").write_text("<html>")
    os.truncate(top / "cut/latest.pt", 300)
    words = f"{SMALL} --dataA {top}/A --dataB {top}/B --max_steps 2 --out_dir {top}"
    assert run(f"{words}/resnet") == 0
    assert run(f"{words}/unet --generator unet --resize crop") == 0
    os.remove(top / "unet/generators.pt")       # latest.pt makes a folder a run
    return top

BAD_INPUT = """
-> --dataA
--checkpoint x --input y -> --output
{train} --batch 3 -> --batch
{train} --gan_loss x -> --gan_loss
{train} --size 34 -> multiple of 4
{train} --load_size 31 -> --load_size
{train} --size 48 --load_size 60 --generator unet -> multiple of 32
{train} --device cuda:99 -> --device
{train} --dataA {top}/none -> {top}/none
{train} --dataB {top}/A -> --dataB
{train} --out_dir {top}/A/x -> {top}/A
{train} --out_dir {top}/unet -> --resume
{train} --out_dir {top}/bad/page.jpg/x -> {top}/bad/page.jpg/x
--resume {top}/none -> {top}/none
{translate} --input {top}/A {top}/B -> same name
{translate} --output {top}/B -> {top}/B exists
{translate} --output {top}/A --overwrite -> {top}/A
{translate} --output {top}/B/x --truth {top}/B -> {top}/B
{translate} --output {top}/bad/page.jpg/x -> {top}/bad/page.jpg/x
""".strip().splitlines()

def modification_times(folder):
    return {path: path.lstat().st_mtime_ns for path in Path(folder).rglob("*")}

@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(top, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    train = f"{SMALL} --dataA {top}/A --dataB {top}/B"
    translate = f"--checkpoint {top}/unet/latest.pt --input {top}/A --output out --device cpu"
    command, named = case.format(top=top, train=train, translate=translate).split("-> ")
    before = modification_times(top)
    assert named in refusal(command, capsys)
    assert os.listdir() == [] and modification_times(top) == before

@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_what_is_no_checkpoint_is_refused_in_one_line(top, capsys, name):
    translate = f"--input {top}/A --output y --ngf 4 --blocks 1 --checkpoint {top}/{name}/latest.pt"
    for words in (translate, f"--resume {top}/{name}"):
        assert re.search(f"{top}/{name}|another version", refusal(words, capsys))

def test_a_folder_without_a_readable_image_ends_the_run(top, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(f"{SMALL} --dataA {top}/bad --dataB b")
    assert "too many unreadable images near" in capsys.readouterr().err

def test_unreadable_images_are_reported_and_replaced_in_training(top, data, capfd):
    run(f"{SMALL} --dataA a {top}/bad --dataB b --out_dir run --max_steps 14 --workers 2")
    assert set(re.findall("skipped .*/bad/(.*?): ", capfd.readouterr().err)) == set(BROKEN)

# ---- Translating ---------------------------------------------------------------------------------
def translate(top, words):
    return run(f"--checkpoint {top}/resnet/generators.pt --output out --device cpu {words}")

@pytest.mark.parametrize("words, side", [
    ("resnet/latest.pt --size 64", 64), ("resnet/latest.pt --native", 0), ("unet/latest.pt", 32),
    ("unet/latest.pt --native", 0)])
def test_translating_keeps_folders_and_names_and_if_native_sizes(top, data, words, side):
    sizes = {"s/ü": (7, 5), "a.b": (33, 50)}
    os.makedirs("in/s")
    for name, size in sizes.items():
        Image.new("RGB", size).save(f"in/{name}.webp")
    assert translate(top, f"--input in --round_trip --checkpoint {top}/{words}") == 0
    for name, size in sizes.items():
        for end in ("", "_back"):
            assert Image.open(f"out/{name}{end}.png").size == ((side, side) if side else size)

@pytest.mark.parametrize("path, direction, names", [
    ("resnet/generators.pt", "AtoB", ["G_AB", "G_BA"]),
    ("unet/latest.pt", "BtoA", ["G_BA", "G_AB"])])          # trained with --resize crop
def test_a_translation_is_the_output_of_the_generator(top, data, path, direction, names):
    words = f"--checkpoint {top}/{path} --direction {direction} --round_trip --input a/000.png"
    assert translate(top, words) == 0
    generators, args = cyclegan.load_generators(top / path)
    x = cyclegan.preprocess(cyclegan.read_image("a/000.png"), args)[None] / 127.5 - 1
    for name, translation in zip(names, ["out/000.png", "out/000_back.png"]):
        x = generators[name](x).detach()
        levels = (x[0].permute(1, 2, 0) + 1) * 127.5
        assert levels_apart(Image.open(translation), levels.numpy()) <= 1
        assert levels.std() > 2

def test_unreadable_images_are_reported_and_skipped_in_translating(top, data, capsys):
    assert translate(top, f"--input a {top}/bad") == 1
    text = capsys.readouterr()
    assert re.findall("skipped .*/bad/(.*?): ", text.err) == BROKEN
    assert "translated 5 of 11 images" in text.out and len(os.listdir("out")) == 5

def test_the_error_inside_and_outside_the_changed_region(top, data, capsys, monkeypatch):
    monkeypatch.setattr(cyclegan, "translate_any", lambda G, x: x + 0.1)
    os.mkdir("input")
    os.mkdir("truth")
    for n_changed in (0, 16, 64):               # of the first and the last, one is not defined
        pixels = np.full((64, 1, 3), 102, np.uint8)
        Image.fromarray(pixels).save(f"input/{n_changed}.png")
        pixels[:n_changed] = 153                # by 0.4, in the range from -1 to 1
        Image.fromarray(pixels).save(f"truth/{n_changed}.png")
    assert translate(top, "--input input --truth truth --native") == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert "error 0.300 (75.0%" in last_line and "elsewhere: error 0.100" in last_line

@pytest.mark.parametrize("Network, words", [
    (textbook_resnet, "--blocks 2"), (textbook_resnet, "--blocks 1 --upsample nearest"),
    (TextbookUNet, "--generator unet --size 32")])
def test_a_generator_of_other_code_is_loaded_by_the_order_of_its_layers(tmp_path, Network, words):
    network = Network(flags(f"{words} --ngf 4"))
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    state = {"model.1.running_mean": torch.ones(4)} | state     # of an old norm, stored in vain
    torch.save(state, tmp_path / "G.pth")
    generators, _ = cyclegan.load_generators(tmp_path / "G.pth", f"{words} --ngf 4".split())
    x = random_images(2, 64)[0]
    y = generators["G_AB"].double()(x)
    assert distance([y], [network.double()(x)]) < 1e-9

# ---- Forks ---------------------------------------------------------------------------------------
# Changes as a stranger would make them: name, most lines of the diff, a column of the log, flags.
FORKS = [
    "spectral_norm 4 D_A", "hinge_r1 22 R1 --gan_loss hinge --r1_every 2", "perceptual 16 vgg_A",
    "ema 12 D_A", "wandb 10 D_A", "accumulate 22 D_A --accumulate 2 --batch_size 2",
    "paired 26 pair_B"]

def apply_fork(name):
    """-> cyclegan.py with the diff of that name, as a module."""
    shutil.copy(ROOT / "cyclegan.py", ".")
    subprocess.run(["git", "apply", ROOT / f"assets/forks/{name}.diff"], check=True)
    fork = types.ModuleType(name)
    exec(Path("cyclegan.py").read_text(), fork.__dict__)
    return fork

@pytest.fixture
def wandb(data, monkeypatch):
    write_images("a", 7)                # as many as in b, for pairs
    vgg = types.SimpleNamespace(features=nn.Sequential(nn.Conv2d(3, 4, 3)))
    monkeypatch.setattr("torchvision.models.vgg16", lambda weights: vgg)
    monkeypatch.setitem(sys.modules, "wandb", mock.Mock())
    return sys.modules["wandb"]

@pytest.mark.parametrize("case", FORKS)
def test_forks_are_short_resume_exactly_and_translate(wandb, monkeypatch, case):
    name, limit, term, *words = case.split()
    diff = (ROOT / f"assets/forks/{name}.diff").read_text()
    assert len(re.findall("^[+-](?!--|[+][+])", diff, re.M)) <= int(limit)
    assert diff in README or name != "spectral_norm"
    fork = apply_fork(name)
    train = f"{TRAIN} {' '.join(words)} --max_steps 4 --save_every 2"
    fork.main(f"{train} --out_dir whole".split())
    def kill_in_step_3(start_time, done, total):
        if done == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(fork, "progress", kill_in_step_3)
    with pytest.raises(KeyboardInterrupt):
        fork.main(train.split())
    fork.main("--resume run".split())
    fork.main("--checkpoint run/generators.pt --input b --output out --device cpu".split())
    ends = [(end_of(run), load(f"{run}/generators.pt")["generators"]) for run in ("run", "whole")]
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    assert load()["rows"][0][term] > 0 and len(os.listdir("out")) == 7

def test_the_average_of_g_is_what_samples_checkpoints_and_translations_use(wandb, monkeypatch):
    fork = apply_fork("ema")
    save_samples = mock.Mock(wraps=fork.save_samples)
    monkeypatch.setattr(fork, "save_samples", save_samples)
    fork.main(f"{TRAIN} --max_steps 1".split())
    latest = load()
    start = fork.CycleGAN(flags(SMALL)).G_AB[0].weight
    average = start.lerp(latest["parts"]["G_AB"]["0.weight"], 0.001)
    assert torch.equal(save_samples.call_args.args[1]["G_AB"][0].weight, average)
    assert torch.equal(latest["generators"]["G_AB"]["0.weight"], average)
    assert torch.equal(fork.load_generators("run/generators.pt")[0]["G_AB"][0].weight, average)

def test_wandb_gets_the_flags_the_rows_and_the_samples(wandb):
    apply_fork("wandb").main(f"{TRAIN} --max_steps 4".split())
    assert wandb.init.call_args.kwargs["config"]["ngf"] == 2
    assert [call.args[0] for call in wandb.log.call_args_list][:2] == load()["rows"]
    wandb.Image.assert_called_once_with(f"{os.getcwd()}/run/samples/step_0000004.png")

def test_accumulated_gradients_are_those_of_the_whole_batch(wandb):
    fork = apply_fork("accumulate")
    answers = []
    for n in (1, 2):
        args = fork.get_args(f"{TRAIN} --pool_size 0 --accumulate {n} --clip 1e6".split())
        answers.append(five_steps(fork, args, fork.Runtime(args)))
    assert 0 < distance(*answers) < 1e-10

def test_the_images_of_a_pair_get_one_crop_and_mirror(wandb):
    fork = apply_fork("paired")
    shutil.copytree("a", "same")
    images = fork.UnpairedImages(fork.get_args(f"{TRAIN} --dataB same".split()))
    assert all(torch.equal(*images[n]) for n in range(9))

@pytest.mark.parametrize("name", ["hinge_r1", "spectral_norm", "ema"])     # flags, layers, parts
def test_the_original_refuses_to_resume_the_run_of_a_fork(wandb, capsys, name):
    apply_fork(name).main(f"{TRAIN} --max_steps 1".split())
    assert "another version" in refusal("--resume run --max_steps 2", capsys)

# ---- CelebA --------------------------------------------------------------------------------------
# Ten images: 1 to 4 are black, 4 to 8 blond, 9 and 10 neither. 3, 6 and 8 have glasses, the even
# ones are male. Image 000000.jpg is not in the list. Each file contains its own name.
CELEBA_TXT = """10
Black_Hair Blond_Hair Eyeglasses Male
000001.jpg  1 -1 -1 -1
000002.jpg  1 -1 -1  1
000003.jpg  1 -1  1 -1
000004.jpg  1  1 -1  1
000005.jpg -1  1 -1 -1
000006.jpg -1  1  1  1
000007.jpg -1  1 -1 -1
000008.jpg -1  1  1  1
000009.jpg -1 -1 -1 -1
000010.jpg -1 -1 -1  1
"""
CELEBA_CSV = "image_id," + re.sub(" +", ",", CELEBA_TXT[3:])
CELEBA_LIST = Path("files/list_attr_celeba.csv")
CELEBA_IMAGES = Path("files/img_align_celeba")
CELEBA_NAMES = [f"{i:06}.jpg" for i in range(11)]

@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """A working folder two levels deep with files/img_align_celeba and a list."""
    work = tmp_path / "a/b"
    (work / CELEBA_IMAGES).mkdir(parents=True)
    monkeypatch.chdir(work)
    CELEBA_LIST.write_text(CELEBA_CSV)
    for name in CELEBA_NAMES:
        (CELEBA_IMAGES / name).write_text(name)
    return tmp_path

def zip_images(path):
    """Writes a zip with two tables and the images, in all kinds of folders."""
    folders = itertools.cycle(["../", "../../", "/", "", "x/x/"])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bbox.csv", "another table")
        archive.writestr("list_attr.csv", CELEBA_CSV)
        for folder, name in zip(folders, CELEBA_NAMES):
            archive.writestr(folder + name, name)

def numbers(*folders):
    """-> for each folder in files the numbers of its images, which have to be complete."""
    found = []
    for folder in folders:
        paths = sorted(Path("files", folder).iterdir())
        assert all(path.read_text() == path.name for path in paths)
        found.append([int(path.stem) for path in paths])
    return found

def assert_sorted_by_hair():
    assert numbers("black", "blond") == [[1, 2, 3, 4], [5, 6, 7, 8]]

def prepare(command=""):
    prepare_celeba.main(command.split())

@pytest.mark.parametrize("ending, text", [
    ("csv", CELEBA_CSV.replace("-1", "0")), ("csv", "\ufeff" + CELEBA_CSV), ("csv.zip", ""),
    ("txt", CELEBA_TXT.replace("\n", "\r\n")), ("txt", CELEBA_TXT[3:]), ("txt.zip", "")])
def test_every_form_of_list_and_images_is_found_and_read(celeba, capsys, ending, text):
    path = CELEBA_LIST.rename(f"files/list_attr_celeba.{ending}")
    path.write_bytes(text.encode())
    if text == "":
        zip_images(path)
        shutil.rmtree(CELEBA_IMAGES)
        shutil.copy(path, "files/img_align_celeba.zip")
    prepare()
    printed = capsys.readouterr().out
    assert "Black_Hair: 4\nBlond_Hair: 4\nboth (kept in A): 1\nneither: 2\n" in printed
    assert_sorted_by_hair()
    folders = {path.parent.name for path in celeba.rglob("*.jpg")}     # no name in a zip escapes
    assert folders <= {"black", "blond", "img_align_celeba"}

@pytest.mark.parametrize("link", ["copy", "hard", "symlink", "move"])
def test_images_are_copied_linked_or_moved_and_never_lost(celeba, monkeypatch, link):
    monkeypatch.setenv("HOME", str(celeba))
    CELEBA_IMAGES.rename(celeba / "images")
    prepare(f"--link {link} --images ~/images")
    first = Path("files/black/000001.jpg")
    assert first.is_symlink() == (link == "symlink")
    assert first.stat().st_nlink == 1 + (link == "hard")
    assert len(os.listdir(celeba / "images")) == (3 if link == "move" else 11)
    prepare(f"--link {link} --images ~/images --test 1")
    prepare("--link move --images ~/images")
    assert_sorted_by_hair()

@pytest.mark.parametrize("link, call", [("hard", "link"), ("symlink", "symlink")])
def test_images_are_copied_where_they_cannot_be_linked(celeba, monkeypatch, capsys, link, call):
    monkeypatch.setattr(os, call, mock.Mock(side_effect=OSError))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    prepare(f"--link {link}")
    assert_sorted_by_hair()
    assert "8 of 8\r" in capsys.readouterr().out       # the live line

@pytest.mark.parametrize("case", [
    "copy replace", "hard replace", "symlink replace", "move replace", "move unlink"])
def test_a_rerun_finishes_an_interrupted_one_then_changes_nothing(celeba, monkeypatch, case):
    link, call = case.split()           # interrupted in the fourth call of this method of Path
    original = getattr(Path, call)
    turns = iter("123")
    def stop_at_the_fourth(path, *args, **flags):
        next(turns)
        return original(path, *args, **flags)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(Path, call, stop_at_the_fourth)
        prepare(f"--link {link}")
    Path("files/blond").mkdir(exist_ok=True)
    Path("files/blond/000007.jpg").write_bytes(b"half")
    Path("files/blond/000008.jpg.part").write_bytes(b"half")
    prepare(f"--link {link}")
    assert_sorted_by_hair()
    before = modification_times("files")
    prepare(f"--link {link}")
    assert modification_times("files") == before

def test_a_doubled_folder_a_missing_image_and_a_foreign_one(celeba, capsys):
    CELEBA_IMAGES.rename("inner")
    CELEBA_IMAGES.mkdir()
    shutil.move("inner", CELEBA_IMAGES / "img_align_celeba")
    (CELEBA_IMAGES / "img_align_celeba/000002.jpg").unlink()
    Path("files/x").mkdir()
    Path("files/x/000011.jpg").write_text("000011.jpg")
    prepare("--nameA x --nameB y --test 1 --limit 2")
    assert numbers("x", "x_test", "y", "y_test") == [[1, 3, 11], [4], [5, 6], [8]]
    assert "left out: 1\n" in capsys.readouterr().out
    prepare("--nameA x --nameB y --test 2")         # moves images
    assert numbers("x", "x_test", "y", "y_test") == [[1, 11], [3, 4], [5, 6], [7, 8]]

def test_attributes_are_chosen_by_presence_and_absence(celeba):
    prepare("--A Eyeglasses --B -Eyeglasses --where Male=0 --where Blond_Hair=0")
    assert numbers("eyeglasses", "no_eyeglasses") == [[3], [1, 9]]

BAD_CELEBA = """
--attributes none -> none: No such; --images none -> jessicali9530/; --images .. --out o -> ..
--attributes html -> web page; --attributes row -> 000010.jpg; --attributes rows -> 9 rows of 10
--attributes cut -> cut is damaged; --attributes empty -> empty is cut short
--images cut -> cut is damaged; --images crc --out o -> (Bad CRC; --A black_hair -> Black_Hair
--test 4 -> 4; --B -Glasses -> --B -Glasses; --where No=1 -> --where No: ; --test -1 -> --test
--where Male -> Male=1; --link soft -> --link; --A Male --B Male -> --nameB; --out empty -> empty
--nameA img_align_celeba --link move -> --nameA; --out empty --toy 1 -> empty
--where Male=1 -> use another --out"""

@pytest.mark.parametrize("case", re.findall("(--.*? -> [^;\n]+)", BAD_CELEBA))
def test_bad_input_is_one_line_and_changes_nothing_in_files(celeba, capsys, case):
    zip_images("crc")
    Path("crc").write_bytes(Path("crc").read_bytes().replace(b"5.jpg00", b"5.jpg11"))
    texts = {"html": "\n<!DOCTYPE html>", "cut": "PK\3\4", "empty": "", "row": CELEBA_CSV[:-9],
             "rows": CELEBA_TXT.partition("000010")[0]}
    for name, text in texts.items():
        Path(name).write_text(text)
    prepare()
    before = modification_times("files")
    command, words = case.split(" -> ")
    assert words in refusal(command, capsys, prepare_celeba)
    assert modification_times("files") == before

def read_faces(folder):
    paths = sorted(Path("files/toy", folder).iterdir())
    return np.array([np.array(Image.open(path), int) for path in paths])

def test_toy_faces_are_people_with_either_hair(celeba):
    prepare("--toy 6 --test 8")
    train = [*read_faces("black"), *read_faces("blond")]
    dark, fair = read_faces("black_test"), read_faces("blond_test")
    assert len({face.tobytes() for face in [*train, *dark]}) == 6 + 6 + 8
    hair = (dark != fair).any(-1).mean((1, 2))      # its share of each image
    assert 0.03 < hair.min() and hair.max() < 0.5
    assert ((fair - dark).mean((1, 2, 3)) > 50 * hair).all()
    before = modification_times("files")
    prepare("--toy 6 --test 8")
    assert modification_times("files") == before
    prepare_celeba.toy_faces("files/toy", 6, 8, seed=1)
    assert modification_times("files") != before

def test_the_published_faces_do_not_change():
    faces = [prepare_celeba.draw_face(np.random.default_rng(i), i % 2 == 1) for i in range(20)]
    pixels = b"".join(face.tobytes() for face in faces)
    assert zlib.crc32(pixels) == 3241511502         # Pillow 11.0 and 13.0 agree

def test_toy_faces_never_overwrite_an_image_that_is_not_theirs(celeba, capsys):
    photo = Path("files/toy/blond_test/00001.png")
    photo.parent.mkdir(parents=True)
    photo.write_text("mine")
    assert str(photo) in refusal("--toy 2 --test 2", capsys, prepare_celeba)
    assert photo.read_text() == "mine"

@pytest.mark.skipif(not CELEBA.exists(), reason="no real CelebA in ../shared/data/celeba")
def test_the_real_list_gives_the_known_counts(tmp_path, capsys):
    prepare(f"--images {CELEBA}/img_align_celeba_half.zip --out {tmp_path} --limit 90 "
            f"--attributes {CELEBA}/list_attr_celeba.txt.zip")
    printed = re.findall(r": ([\d,]+)", capsys.readouterr().out)
    assert printed == "202,599 48,472 29,980 3 124,147 74,569 90 90".split()

# ---- The documents -------------------------------------------------------------------------------
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?ms)^ *```(\w*)\n(.*?)^ *```", README)

def test_the_readme_explains_every_flag():
    for name in vars(flags()):
        assert re.search(rf"--{name}\b", README), name

def test_the_readme_has_no_dead_link():
    for target in re.findall(r"\]\((?!http)(.*?)\)", README):
        assert (ROOT / target).exists(), target

def test_the_readme_lists_the_sections_of_the_file():
    source = (ROOT / "cyclegan.py").read_text()
    sections = re.findall(r"^# ---- (\d+)\. (.+?) -+$", source, re.M)
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", README, re.M)
    assert len(sections) == 12
    assert [row for row in rows if row in sections] == sections

# Appended to a command to make it small: the first of these words that it has decides.
SMALLER = {"--bench": f"{SMALL} --rounds 1", "--resume": "--max_steps 3",
           "cyclegan.py": f"{SMALL} --max_steps 2 --batch_size 2 --no-compile --overwrite",
           "prepare_celeba.py": "--test 1"}
NOT_RUN = set("pip source git cd pytest -m DIR --gpu".split())

def document_commands():
    """-> the commands in the docstrings and in the README, as lists of words, each once."""
    docstrings = "\n".join([prepare_celeba.__doc__, cyclegan.__doc__, __doc__])
    lines = re.findall(r"^ *((?:python|torchrun) .*?)(?:  .*)?$", docstrings, re.M)
    lines += re.findall(r"^\w.*", "".join(text for name, text in BLOCKS if name == ""), re.M)
    commands = [shlex.split(line, comments=True) for line in dict.fromkeys(lines)]
    return [words for words in commands if not NOT_RUN.intersection(words)]

def test_every_command_and_program_in_the_documents_runs(celeba, monkeypatch, capsys):
    draw = prepare_celeba.toy_faces
    monkeypatch.setattr(prepare_celeba, "toy_faces", lambda out, *_, **__: draw(out, 3, 2))
    for folder in ("photos mnist svhn horse2zebra/trainA horse2zebra/trainB monet2photo/trainA "
                   "monet2photo/trainB cezanne2photo/trainA").split():
        write_images(folder, 3)
    for path in CELEBA_IMAGES.iterdir():
        shutil.copy("photos/000.png", path)
    torch.save(textbook_resnet(flags(SMALL)).state_dict(), "latest_net_G_A.pth")
    commands = document_commands()
    assert len(commands) > 20
    for words in commands:
        if "files/black" in words and "--out_dir" not in words:
            shutil.rmtree("runs/black2blond", ignore_errors=True)
        added = next(SMALLER[word] for word in SMALLER if word in words)
        if words[0] == "torchrun":      # reads its flags; other tests start its processes
            args = torchrun.parse_args(words[1:])
            words = ["python", args.training_script, *args.training_script_args]
        program = import_module(words[1].removesuffix(".py"))
        assert not program.main(words[2:] + added.split()), words
    assert capsys.readouterr().out.count("inside the changed region") == 16     # 2 for each demo
    subprocess.run([sys.executable, ROOT / "prepare_celeba.py", "--toy", "1"], check=True)
    for name in ("matplotlib", "matplotlib.pyplot"):        # not a package of the tests
        monkeypatch.setitem(sys.modules, name, mock.Mock())
    for language, text in BLOCKS:
        if language == "python":
            exec(text, {})

# ---- The proof against the official code ---------------------------------------------------------
# Official names: G_A is our G_AB, D_A judges B, and idt_A is what G_A makes of B.
OFFICIAL_NAMES = {"G_A": "adv_AB", "G_B": "adv_BA", "cycle_A": "cycle_A", "cycle_B": "cycle_B",
                  "idt_A": "idt_B", "idt_B": "idt_A", "D_A": "D_B", "D_B": "D_A"}

def official_model(words):
    """-> the official CycleGANModel, with its own defaults and these flags, on the CPU."""
    words += " --dataroot - --pool_size 0 --init_type normal --no_antialias --no_antialias_up"
    with contextlib.redirect_stdout(sys.stderr):        # it reports each network
        Model = import_module("models.cycle_gan_model").CycleGANModel
        parser = argparse.ArgumentParser()
        import_module("options.train_options").TrainOptions().initialize(parser)
        options, _ = Model.modify_commandline_options(parser).parse_known_args(words.split())
        options.isTrain, options.gpu_ids, options.amp = True, [], False
        options.device = torch.device("cpu")
        return Model(options)

def compare_training():
    """1. Training in float64: resnet_6blocks and PatchGAN with 8 channels, 64 pixels, batch 1,
    lsgan, identity 0.5, no pool. The largest relative difference of the 8 losses:"""
    torch.set_default_dtype(torch.float64)
    official = official_model("--netG resnet_6blocks --ngf 8 --ndf 8")
    model, *rest = make_trainer("--size 64 --ngf 8 --ndf 8 --pool_size 0 --device cpu --amp off")
    networks = [official.netG_A, official.netG_B, official.netD_B, official.netD_A]
    copy_weights(nn.ModuleList(networks), model)
    for step in range(1, 21):
        real_A, real_B = random_images(1, 64, seed=step)
        official.set_input({"A": real_A, "B": real_B, "A_paths": "", "B_paths": ""})
        official.optimize_parameters()
        terms = cyclegan.train_step(model, *rest, real_A, real_B, step)
        differences = [abs(terms[OFFICIAL_NAMES[name]].item() / loss - 1)
                       for name, loss in official.get_current_losses().items()]
        yield f"step {step}", np.max(differences), 1e-10 if step == 1 else 1e-5
    difference = distance([model.G_AB(real_A)], [official.netG_A(real_A)])
    yield "translation after step 20", difference, 1e-5
    torch.set_default_dtype(torch.float32)

def compare_checkpoints():
    """2. Official generators, saved there and loaded here as by --checkpoint, in float32.
    The relative difference of the translations of a random image:"""
    cases = {"resnet_9blocks": "--blocks 9", "resnet_6blocks": "--blocks 6",
             "unet_256": "--generator unet", "unet_128": "--generator unet --size 128"}
    for netG, words in cases.items():
        G = official_model(f"--netG {netG}").netG_A
        file = io.BytesIO()
        torch.save(G.state_dict(), file)
        file.seek(0)
        generators, args = cyclegan.load_generators(file, words.split())
        image, _ = random_images(1, args.size, torch.float32)
        yield f"{netG}, {words}", distance([generators["G_AB"](image)], [G(image)]), 1e-4

def compare_inputs():
    """3. JPEG files, resized to 256x256: the largest difference of the networks' inputs, in units
    of 1/255:"""
    options = official_model("--load_size 256 --no_flip").opt
    transform = import_module("data.base_dataset").get_transform(options)
    args = flags("--device cpu")
    for size in [(61, 97), (178, 218), (500, 333), (3000, 2000)]:
        file = io.BytesIO()
        colors = Image.merge("HSV", [Image.radial_gradient("L")] * 3).convert("RGB")
        colors.resize(size).save(file, "JPEG")
        theirs = transform(Image.open(file).convert("RGB"))
        ours = cyclegan.preprocess(cyclegan.read_image(file), args)
        difference = (cyclegan.Runtime(args).to_float(ours) - theirs).abs().max()
        yield f"{size}", 127.5 * difference, 1e-3

def compare_with_official(folder):
    """Prints how far cyclegan.py is from the official code. Returns 1 if further than allowed."""
    sys.path.insert(0, os.path.abspath(folder))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"cyclegan.py and the official code in {folder}, from the same weights and images;\n"
          f"torch {torch.__version__}, CPU")
    n_exceeded = 0
    for compare in (compare_training, compare_checkpoints, compare_inputs):
        print(f"\n{compare.__doc__}\n")
        for what, value, allowed in compare():
            print(f"  {what:45}{value:10.1e}   (allowed: {allowed:.0e})", flush=True)
            n_exceeded += not value <= allowed
    print(f"\n{n_exceeded} differences are larger than allowed")
    return n_exceeded > 0

# ---- The benchmark -------------------------------------------------------------------------------
TEXTBOOK = "textbook step, eager, float32"
SHIPPED = "cyclegan.py, the program as shipped"
CASES = {TEXTBOOK: "", SHIPPED: "", "  with --amp off --no-compile": "--amp off --no-compile"}

def make_stepper(case, words):
    """-> a function that takes a training step of the textbook or of cyclegan.py."""
    model, *rest, runtime = make_trainer(words)
    args = runtime.args
    images = random_images(args.batch_size, args.size, torch.float32)
    images = [image.to(runtime.device) for image in images]
    if case == TEXTBOOK:
        return functools.partial(Textbook(args).load(model).step, *images)
    return functools.partial(cyclegan.train_step, model, *rest, runtime, *images, step=1)

def seconds_per_step(take_step, n_steps):
    start = time.perf_counter()
    for _ in range(n_steps):
        take_step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / n_steps

def bench(words, rounds):
    """Times all cases interleaved in one process, half a second each per round; prints a table."""
    args = flags(words)
    torch._dynamo.reset()               # a network is compiled for only a few batch sizes
    steppers = {case: make_stepper(case, f"{words} {CASES[case]}") for case in CASES}
    for take_step in steppers.values():
        seconds_per_step(take_step, 3)              # compiles; cuDNN tries its algorithms
    n_steps = math.ceil(0.5 / seconds_per_step(steppers[TEXTBOOK], 1))
    seconds = {case: np.zeros(rounds) for case in CASES}
    for i in range(rounds):
        for case, take_step in steppers.items():
            seconds[case][i] = seconds_per_step(take_step, n_steps)
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "CPU"
    print(f"\n{device}, torch {torch.__version__}, flags: {words}\n\n"
          f"{f'median of {rounds} rounds (min to max)':40}{'ms per step':28}{'images/s':10}speed")
    for case, times in seconds.items():
        median, low, high = 1000 * np.quantile(times, [0.5, 0, 1])
        ratio = np.median(seconds[TEXTBOOK] / times)
        print(f"{case:40}{median:<8.1f}{f'({low:.1f} to {high:.1f})':20}"
              f"{2000 * args.batch_size / median:<10.3g}{ratio:.2f}x")
    low, median, high = np.quantile(seconds[TEXTBOOK] / seconds[SHIPPED], [0, 0.5, 1])
    print(f"\nratio: the program as shipped is {median:.2f} ({low:.2f} to {high:.2f}) times as fast"
          " as the textbook step", flush=True)

def measure_gpu():
    """Prints the benchmark for two batch sizes and a profile of one step."""
    for batch_size in (1, 16):
        bench(f"--batch_size {batch_size} --device cuda", rounds=5)
    take_step = make_stepper(SHIPPED, "--device cuda")
    seconds_per_step(take_step, 3)
    with torch.profiler.profile() as profile:
        seconds_per_step(take_step, 1)
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=15))

def main(argv):
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--official")
    group.add_argument("--gpu", action="store_true")
    group.add_argument("--bench", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    args, rest = parser.parse_known_args(argv)
    if args.official:
        return compare_with_official(args.official)
    if args.gpu:
        return measure_gpu()
    bench(" ".join(rest), args.rounds)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
