"""
The tests of cyclegan.py and prepare_celeba.py, the textbook step, the proof against the official
code, and the benchmark.

  pytest                                           all tests; no GPU and no network needed
  python test_cyclegan.py --official DIR           compares with a clone of the official code
  python test_cyclegan.py --bench --size 128       times cyclegan.py and the textbook step
  python test_cyclegan.py --gpu DIR                tests, benchmark and profile on a CUDA device
"""
import argparse
import contextlib
import copy
import csv
import functools
import importlib
import io
import itertools
import math
import multiprocessing
import operator
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
import types
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

import cyclegan
import prepare_celeba

ROOT = Path(__file__).resolve().parent
CELEBA = ROOT / "../shared/data/celeba"
SMALL = "--size 32 --load_size 36 --ngf 2 --ndf 2 --blocks 1 --device cpu --workers 0"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """These networks are too small for more threads. Processes started here inherit it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(ROOT)
    torch.set_num_threads(1)

def flags(words=""):
    """-> the flags of a training run on folders that nobody looks into."""
    return cyclegan.get_args(f"--dataA a --dataB b {words}".split())

def run(words):
    """Runs a command line of cyclegan.py in this process -> its exit status."""
    return cyclegan.main(words.split())

def random_images(n, size, dtype=torch.float64, seed=0):
    """-> real_A, real_B: (n, 3, size, size) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.rand(2, n, 3, size, size, generator=generator, dtype=dtype) * 2 - 1
    return pair[0], pair[1]

def distance(xs, ys):
    """-> ||x - y|| / ||y|| over two lists of tensors."""
    x = torch.cat([tensor.detach().double().flatten() for tensor in xs])
    y = torch.cat([tensor.detach().double().flatten() for tensor in ys])
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
    """An empty folder to work in, with a/ (7 images) and b/ (5 images)."""
    monkeypatch.chdir(tmp_path)
    write_images("a", 7, seed=1)
    write_images("b", 5, seed=2)
    return tmp_path

# ---- The textbook step ---------------------------------------------------------------------------
# The paper on a blackboard: PyTorch's own layers, one call for each arrow of its Figure 3, six
# passes through the generators, nothing merged. It is what the tests compare cyclegan.py with, and
# the baseline of the benchmark. Its layers come in the same order as those of cyclegan.py.
def textbook_up(n_in, n_out, args):
    """-> a layer that doubles height and width."""
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
        layers += [nn.Conv2d(k, 2 * k, 3, stride=2, padding=1), nn.InstanceNorm2d(2 * k), nn.ReLU()]
    for _ in range(args.blocks):
        layers += [TextbookResidual(4 * n)]
    for k in (4 * n, 2 * n):
        layers += [textbook_up(k, k // 2, args), nn.InstanceNorm2d(k // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(n, 3, 7), nn.Tanh())

class TextbookUNet(nn.Module):
    """pix2pix (Isola et al. 2017, §6.1): C64, C128, C256, C512, C512, ... while the side is even,
    8 times at most, and up again, where a level also gets what had its size on the way down."""
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
        x = self.downs[0](x)
        skips = [x]
        for down in self.downs[1:-1]:
            x = F.instance_norm(down(F.leaky_relu(x, 0.2)))
            skips.append(x)
        x = self.downs[-1](F.leaky_relu(x, 0.2))
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
        layers += [nn.Conv2d(k, 2 * k, 4, stride, padding=1),
                   nn.InstanceNorm2d(2 * k), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8 * n, 1, 4, stride=1, padding=1))

def textbook_gan_loss(name, scores, is_real):
    """The loss of scores whose images are real, or are not: least squares (Mao et al.), cross-
    entropy (Eq. 1), focal (Lin et al., Eq. 4) and GHM-C (Li et al., Eqs 3-7)."""
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
    """Between networks with the same layers in the same order."""
    with torch.no_grad():
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs)

class Textbook(nn.Module):
    """The four networks of the paper, its objective and its training step."""
    def __init__(self, args):
        super().__init__()
        self.args = args
        Generator = TextbookUNet if args.generator == "unet" else textbook_resnet
        self.G_AB, self.G_BA = Generator(args), Generator(args)
        self.D_A, self.D_B = textbook_patchgan(args), textbook_patchgan(args)
        self.G = nn.ModuleList([self.G_AB, self.G_BA])
        self.D = nn.ModuleList([self.D_A, self.D_B])
        self.adam_G = torch.optim.Adam(self.G.parameters(), args.lr, (args.beta1, 0.999))
        self.adam_D = torch.optim.Adam(self.D.parameters(), args.lr, (args.beta1, 0.999))
        self.pool_A = cyclegan.ImagePool(args.pool_size)
        self.pool_B = cyclegan.ImagePool(args.pool_size)

    def load(self, model):
        """Takes over weights, precision and device of a cyclegan.CycleGAN."""
        self.to(next(model.parameters()))
        copy_weights(model, self)
        return self

    def generator_loss(self, real_A, real_B):
        """Eq. 3 and the identity term of §5.2."""
        fake_B, fake_A = self.G_AB(real_A), self.G_BA(real_B)
        rec_A, rec_B = self.G_BA(fake_B), self.G_AB(fake_A)
        name = "lsgan" if self.args.gan_loss == "lsgan" else "bce"      # focal, GHM: for D only
        gan_B = textbook_gan_loss(name, self.D_B(fake_B), is_real=True)
        gan_A = textbook_gan_loss(name, self.D_A(fake_A), is_real=True)
        cycle = F.l1_loss(rec_A, real_A) + F.l1_loss(rec_B, real_B)
        loss = gan_B + gan_A + self.args.lambda_cycle * cycle
        if self.args.lambda_identity > 0:
            idt_A, idt_B = self.G_BA(real_A), self.G_AB(real_B)
            identity = F.l1_loss(idt_A, real_A) + F.l1_loss(idt_B, real_B)
            loss = loss + self.args.lambda_cycle * self.args.lambda_identity * identity
        return loss, fake_A.detach(), fake_B.detach()

    def discriminator_loss(self, real_A, real_B, fake_A, fake_B):
        """Eq. 1, halved (§7.1)."""
        loss = 0
        for D, real, fake in ((self.D_A, real_A, fake_A), (self.D_B, real_B, fake_B)):
            loss = loss + textbook_gan_loss(self.args.gan_loss, D(real), is_real=True) / 2
            loss = loss + textbook_gan_loss(self.args.gan_loss, D(fake), is_real=False) / 2
        return loss

    def step(self, real_A, real_B):
        """-> both losses, before their updates."""
        loss_G, fake_A, fake_B = self.generator_loss(real_A, real_B)
        self.adam_G.zero_grad()
        loss_G.backward(inputs=[*self.G.parameters()])
        self.adam_G.step()
        fake_A, fake_B = self.pool_A.query(fake_A), self.pool_B.query(fake_B)
        loss_D = self.discriminator_loss(real_A, real_B, fake_A, fake_B)
        self.adam_D.zero_grad()
        loss_D.backward(inputs=[*self.D.parameters()])
        self.adam_D.step()
        return [loss_G.detach(), loss_D.detach()]

# ---- Flags ---------------------------------------------------------------------------------------
NUMBERS = [name for name, value in vars(flags("--workers 0")).items()
           if type(value) in (int, float)]
COUNTS = "size load_size ngf ndf max_steps batch_size log_every sample_every save_every".split()
NO_DEFAULT = ("demo resume dataA dataB checkpoint input output overwrite native round_trip "
              "truth".split())

def error_line(capsys, words):
    """Runs a command line that must be refused with status 2 -> the one line on stderr."""
    with pytest.raises(SystemExit, match="2"):
        run(words)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("cyclegan.py: ") and len(line) < 300
    assert "<function" not in line
    return line

def help_text(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    return capsys.readouterr().out

def test_help_begins_with_the_commands_and_states_every_default(capsys):
    text = help_text(capsys)
    groups = re.findall(r"^([a-z]+):$", text, re.M)
    assert text.index("python cyclegan.py --demo") < text.index("options:")
    assert groups == "options run data networks objective schedule speed output translate".split()
    for entry in text.split("\n  --")[1:]:
        name = re.match(r"\w+", entry).group()
        assert ("(default:" in entry or "(auto:" in entry) == (name not in NO_DEFAULT), name

@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_refused_outside_its_range(name, capsys):
    values = ["", "x", "-1", "nan", "inf", "1e30", "9999999999999"]
    if name in COUNTS:
        values += ["0", "1.5"]
    for value in values:
        assert f"--{name}:" in error_line(capsys, f"--dataA a --dataB b --{name}={value}")

def test_typed_flags_override_stored_ones_and_these_the_defaults(top):
    stored = cyclegan.load_generators(f"{top}/unet")[1]
    args = cyclegan.get_args(["--lr=0.25"], stored)
    assert (args.lr, args.ngf, args.batch_size) == (0.25, 2, 1)

def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    args = cyclegan.get_args(["--dataA", "~/a", "/x/../b", "--dataB=~/c", "--out_dir=~/run"])
    assert [*args.dataA, *args.dataB, args.out_dir] == ["/me/a", "/b", "/me/c", "/me/run"]

# ---- Images --------------------------------------------------------------------------------------
# Extension, mode, color with transparency, and the color it is read as.
READABLE = """
png  1     #ffffffff  #ffffff
png  L     #4d4d4dff  #4d4d4d
png  LA    #00000080  #7f7f7f
jpg  CMYK  #ff0000ff  #ff0000
tif  LAB   #777777ff  #777777
png  P     #ff0000ff  #ff0000
png  RGBA  #ff000080  #ff7f7f
webp RGBA  #09090900  #ffffff
gif  RGBA  #09090900  #ffffff
""".strip().splitlines()
# How to store an image for the orientations 2 to 8 of the EXIF standard.
STORED_AS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"
RED = Image.new("RGB", (9, 9), "red")

def levels_apart(image, other):
    """-> the largest difference between two images, of 255 levels."""
    return np.abs(np.array(image, float) - np.array(other)).max()

@pytest.mark.parametrize("case", READABLE)
def test_an_image_is_read_as_rgb_on_white(tmp_path, case):
    extension, mode, color, expected = case.split()
    image = Image.new("RGBA", (9, 9), color)
    if mode == "LAB":
        image = image.convert("RGB")
    image.convert(mode).save(tmp_path / f"x.{extension}")
    image = cyclegan.read_image(tmp_path / f"x.{extension}")
    assert image.mode == "RGB"
    assert levels_apart(image, Image.new("RGB", (9, 9), expected)) <= 2

def test_a_color_and_a_palette_can_be_transparent(tmp_path):
    path = tmp_path / "x.png"
    RED.save(path, transparency=(255, 0, 0))
    assert levels_apart(cyclegan.read_image(path), 255) == 0
    RED.quantize(1).save(path, transparency=0)
    assert levels_apart(cyclegan.read_image(path), 255) == 0

@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp"])
def test_an_animation_is_read_as_its_first_image(tmp_path, name):
    RED.save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert levels_apart(cyclegan.read_image(tmp_path / name), RED) <= 2

@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_an_image_is_rotated_as_its_exif_data_says(tmp_path, name):
    upright = Image.new("RGB", (48, 32))
    upright.paste("white", (0, 0, 16, 16))
    for orientation, how in enumerate(STORED_AS.split(), 2):
        stored = upright.transpose(Image.Transpose[how])
        exif = Image.Exif()
        exif[0x112] = orientation
        stored.save(tmp_path / name, exif=exif.tobytes(), lossless=True)
        assert levels_apart(cyclegan.read_image(tmp_path / name), upright) <= 2

@pytest.mark.parametrize("case", ["I;16 x.png", "I;16 x.pgm", "I;16 x.tif", "I x.tif", "F x.tif"])
def test_more_than_8_bits_are_refused_by_name(tmp_path, case):
    mode, name = case.split()
    Image.new(mode, (9, 9)).save(tmp_path / name)
    with pytest.raises(OSError, match=f"{name}.*8 bits"):
        cyclegan.read_image(tmp_path / name)

def test_a_large_jpeg_is_decoded_small_and_a_bomb_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (800, 600)).save(path)
    assert cyclegan.read_image(path, 70).size == (100, 75)
    assert cyclegan.read_image(path).size == (800, 600)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match=f"{path}.*exceeds limit"):
        cyclegan.read_image(path)

def test_find_images(tmp_path, capsys, monkeypatch):
    images = ["A B.JPG", "sub/deep/x.webp", "y.txt.png/z.gif", "ünï ☃.jpeg"]
    others = ["._x.jpg", ".git/x.jpg", "locked/x.jpg", "run/latest.pt", "notes.txt"]
    for name in images + others:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.symlink("..", tmp_path / "sub/loop")
    scandir = os.scandir

    def refuse_locked(folder):                  # by hand, since root can read everything
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", refuse_locked)
    assert cyclegan.find_images(str(tmp_path)) == [tmp_path / name for name in images]
    locked, skipped = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/locked" in locked
    assert skipped == f"{tmp_path}: skipped 2 files of other types"

def test_an_image_can_be_given_without_its_folder(data, capsys):
    assert cyclegan.find_images("a/000.png") == [Path("a/000.png")]
    assert capsys.readouterr().out == ""

# ---- Preprocessing and order ---------------------------------------------------------------------
@pytest.mark.parametrize("width, height", [
    (180, 220), (80, 60), (36, 36), (500, 40), (1, 1), (3, 900)])
def test_preprocessing_resizes_then_crops_the_center(width, height):
    image = Image.effect_noise((width, height), 60).convert("RGB")
    shorter = min(width, height)
    sizes = {"stretch": (32, 32), "crop": (32 * width // shorter, 32 * height // shorter)}
    for resize, size in sizes.items():
        result = cyclegan.preprocess(image, flags(f"{SMALL} --resize {resize}"))
        pixels = np.array(image.resize(size, Image.Resampling.BICUBIC))
        x = round((size[0] - 32) / 2)
        y = round((size[1] - 32) / 2)
        assert np.array_equal(result.permute(1, 2, 0), pixels[y:y + 32, x:x + 32])

@pytest.mark.parametrize("words, least, most", [("", 120, 180), ("--no-flip", 0, 0)])
def test_augmentation_crops_at_random_and_mirrors_half_of_the_images(words, least, most):
    y, x = np.mgrid[:36, :72].astype(np.uint8)
    pixels = np.stack([x, y, x], axis=2)        # of the load size: resizing changes nothing
    args = flags(f"{SMALL} --resize crop {words}")
    torch.manual_seed(0)
    n_mirrored, corners = 0, set()
    for _ in range(300):
        crop = cyclegan.preprocess(Image.fromarray(pixels), args, augment=True)
        if crop[0, 0, 0] > crop[0, 0, -1]:
            n_mirrored += 1
            crop = crop.flip(2)
        x, y, _ = crop[:, 0, 0].tolist()
        corners.add((x, y))
        assert np.array_equal(crop.permute(1, 2, 0), pixels[y:y + 32, x:x + 32])
    assert least <= n_mirrored <= most
    assert len(corners) > 100

@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_is_a_function_of_seed_and_place_alone(data, workers):
    args = flags(f"{SMALL} --workers {workers}")
    images = cyclegan.UnpairedImages(args)
    images.paths_B = images.paths_B[:1]         # only its crops can depend on the seed
    torch.manual_seed(workers)                  # must not matter
    batches = cyclegan.load_batches(images, range(3, 9), cyclegan.Runtime(args))
    for n, batch in enumerate(batches, 2):
        item = torch.stack(images[n])
        assert torch.equal(torch.cat(batch), item / 127.5 - 1)
    args.seed = 1
    assert not torch.equal(item[1], images[n][1])

def test_every_lap_shows_each_image_once_in_a_new_order(data):
    for i in range(8):
        for folder in "ab":
            Image.new("L", (9, 9), 20 * i).save(f"{folder}/{i:03}.png")
    images = cyclegan.UnpairedImages(flags(SMALL))
    laps = []
    for domain in (0, 1):
        for start in (0, 8, 16):
            lap = [int(images[n][domain].max()) // 20 for n in range(start, start + 8)]
            assert sorted(lap) == list(range(8))
            assert lap not in laps              # nor does B follow the order of A
            laps.append(lap)

# ---- The objective and the step ------------------------------------------------------------------
each_generator = pytest.mark.parametrize("generator", ["resnet", "unet"])
each_upsample = pytest.mark.parametrize("upsample", ["deconv", "nearest"])
each_gan_loss = pytest.mark.parametrize("gan_loss", ["lsgan", "bce", "focal", "ghm"])
each_identity = pytest.mark.parametrize("identity", [0, 0.5])

def make_pair(words):
    """-> a small cyclegan.CycleGAN in float64, and a Textbook with the same weights."""
    args = flags(f"--size 32 --ngf 3 --ndf 3 --blocks 1 --lambda_cycle 7 {words}")
    torch.manual_seed(1)
    model = cyclegan.CycleGAN(args).double()
    for parameter in model.parameters():    # N(0, 0.02) leaves networks this small too flat to test
        nn.init.normal_(parameter, 0, 0.2)
    return model, Textbook(args).load(model)

def make_trainer(words, n_steps=0):
    """-> model, optimizers, pools and runtime: what train_step needs besides images."""
    args = flags(words)
    torch.manual_seed(args.seed)
    runtime = cyclegan.Runtime(args)
    model = cyclegan.CycleGAN(args).to(runtime.device)
    runtime.compile(model, n_steps)
    pools = {"A": cyclegan.ImagePool(args.pool_size), "B": cyclegan.ImagePool(args.pool_size)}
    return model, cyclegan.make_optimizers(model, args), pools, runtime

def gradients(loss, *networks):
    """-> the gradients of a loss with respect to all parameters of some networks."""
    return torch.autograd.grad(loss, nn.ModuleList(networks).parameters())

@each_generator
@each_upsample
@each_gan_loss
@each_identity
def test_generator_loss_and_gradients_equal_the_textbooks(generator, upsample, gan_loss, identity):
    model, book = make_pair(f"--generator {generator} --upsample {upsample} --gan_loss {gan_loss} "
                            f"--lambda_identity {identity}")
    images = random_images(2, 32)
    loss, terms, *fakes = model.generator_loss(*images)
    book_loss, *book_fakes = book.generator_loss(*images)
    assert distance([loss, sum(terms.values())], [book_loss, book_loss]) < 1e-10
    assert distance(fakes, book_fakes) < 1e-10
    assert not any(fake.requires_grad for fake in fakes)
    book_gradients = gradients(book_loss, book.G)
    assert distance(gradients(loss, model.G_AB, model.G_BA), book_gradients) < 1e-10

@each_gan_loss
def test_discriminator_loss_and_gradients_equal_the_textbooks(gan_loss):
    model, book = make_pair(f"--gan_loss {gan_loss}")
    real_A, real_B = random_images(2, 32)
    fake_A, fake_B = random_images(2, 32, seed=3)
    loss, terms = model.discriminator_loss(real_A, real_B, fake_A, fake_B)
    book_loss = book.discriminator_loss(real_A, real_B, fake_A, fake_B)
    assert distance([loss, terms["D_A"] + terms["D_B"]], [book_loss, book_loss]) < 1e-10
    real = (book.D_A(real_A) + book.D_B(real_B)).mean() / 2
    fake = (book.D_A(fake_A) + book.D_B(fake_B)).mean() / 2
    assert distance([terms["D(real)"], terms["D(fake)"]], [real, fake]) < 1e-10
    book_gradients = gradients(book_loss, book.D)
    assert distance(gradients(loss, model.D_A, model.D_B), book_gradients) < 1e-10

class PreviousFakes:
    """An image pool without chance: it returns the fakes of the step before."""
    fakes = None

    def query(self, fakes):
        previous = fakes if self.fakes is None else self.fakes
        self.fakes = fakes
        return previous

@pytest.mark.parametrize("words, dtype, bound", [
    ("cpu --amp off", torch.float64, 1e-6),
    ("cpu --amp bf16", torch.float32, 3e-2),
    pytest.param("cuda --amp off", torch.float32, 3e-2, marks=needs_cuda),
    pytest.param("cuda --amp bf16", torch.float32, 3e-2, marks=needs_cuda),
    pytest.param("cuda --amp fp16", torch.float32, 3e-2, marks=needs_cuda),
    pytest.param("cuda --compile on", torch.float32, 3e-2, marks=needs_cuda)])
def test_ten_steps_follow_the_textbook(words, dtype, bound):
    words = f"--size 32 --ngf 8 --ndf 8 --blocks 2 --device {words}"
    model, optimizers, pools, runtime = make_trainer(words)
    book = Textbook(flags(words)).load(model.to(dtype))
    pools["A"], pools["B"], book.pool_A, book.pool_B = [PreviousFakes() for _ in range(4)]
    losses, book_losses = [], []
    for step in range(1, 11):
        images = [image.to(runtime.device) for image in random_images(1, 32, dtype, seed=step)]
        terms = cyclegan.train_step(model, optimizers, pools, runtime, *images, step)
        losses.append(sum(terms[name] for name in terms if not name.startswith("D")))
        losses.append(terms["D_A"] + terms["D_B"])
        book_losses += book.step(*images)
    assert 0 < distance(losses, book_losses) < bound

@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 needs a GPU for it")
def test_cudas_autocast_keeps_activations_in_bf16():
    """On tensors without values, so that it needs no GPU."""
    dtypes = set()
    def note_dtype(module, inputs, output):
        dtypes.add(output.dtype)
    hook = nn.modules.module.register_module_forward_hook(note_dtype)
    with hook, torch._subclasses.FakeTensorMode(), torch.device("cuda"):
        model = cyclegan.CycleGAN(flags(SMALL))
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        loss, *_ = model.generator_loss(*torch.zeros(2, 1, 3, 32, 32))
        torch.set_autocast_enabled("cuda", False)
    assert dtypes == {torch.bfloat16}
    assert loss.dtype == torch.float32

def test_identity_gets_images_of_the_generators_own_domain():
    """G_AB should leave B unchanged, and G_BA A; not the other way round."""
    model = cyclegan.CycleGAN(flags(SMALL))
    model.G_AB = nn.LeakyReLU(0.5)          # of negative numbers: halves them
    model.G_BA = nn.LeakyReLU(0.25)
    real_A = torch.full((1, 3, 32, 32), -1.0)
    _, terms, fake_A, fake_B = model.generator_loss(real_A, 2 * real_A)
    assert (fake_B == -0.5).all() and (fake_A == -0.5).all()
    assert terms["cycle_A"] == 10 * (1 - 0.125)
    assert terms["cycle_B"] == 10 * (2 - 0.25)
    assert terms["idt_A"] == 10 * 0.5 * (1 - 0.25)
    assert terms["idt_B"] == 10 * 0.5 * (2 - 1)

def test_gradients_do_not_depend_on_the_memory_layout():
    """With nn.InstanceNorm2d they do, on a CPU for a single image."""
    model, _ = make_pair("")
    images = random_images(1, 32)
    contiguous = gradients(model.generator_loss(*images)[0], model)
    model.to(memory_format=torch.channels_last)
    images = [image.contiguous(memory_format=torch.channels_last) for image in images]
    assert distance(gradients(model.generator_loss(*images)[0], model), contiguous) < 1e-10

@each_generator
@each_upsample
@each_gan_loss
@each_identity
@pytest.mark.parametrize("pool_size", [0, 50])
def test_every_combination_of_flags_takes_a_step_downhill(
        generator, upsample, gan_loss, identity, pool_size):
    model, optimizers, pools, runtime = make_trainer(
        f"{SMALL} --ngf 4 --ndf 8 --amp off --generator {generator} --upsample {upsample} "
        f"--gan_loss {gan_loss} --lambda_identity {identity} --pool_size {pool_size}")
    before = copy.deepcopy(model)
    images = random_images(2, 32, torch.float32)
    loss_G, terms_G, *fakes = before.generator_loss(*images)
    loss_D, terms_D = before.discriminator_loss(*images, *fakes)
    terms = cyclegan.train_step(model, optimizers, pools, runtime, *images, step=1)
    assert list(terms) == [*terms_G, *terms_D]
    assert ("idt_A" in terms) == (identity > 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.discriminator_loss(*images, *fakes)[0] < loss_D
    before.G_AB, before.G_BA = model.G_AB, model.G_BA       # against the D that they met
    assert before.generator_loss(*images)[0] < loss_G

# ---- The networks --------------------------------------------------------------------------------
@pytest.mark.parametrize("Network, words, n_parameters", [
    (cyclegan.ResNetGenerator, "", 11_378_179),
    (cyclegan.ResNetGenerator, "--size 128", 7_837_699),
    (cyclegan.UNetGenerator, "", 54_409_603),
    (cyclegan.PatchDiscriminator, "", 2_764_737)])
def test_networks_have_as_many_parameters_as_documented(Network, words, n_parameters):
    with torch.device("meta"):
        network = Network(flags(words))
    assert sum(parameter.numel() for parameter in network.parameters()) == n_parameters
    assert f"{n_parameters:,}" in Network.__doc__

def test_a_score_sees_70x70_pixels():
    D = cyclegan.PatchDiscriminator(flags("--ndf 2"))
    layers = [layer for layer in D if not isinstance(layer, cyclegan.InstanceNorm)]     # sees all
    image = torch.rand(1, 3, 256, 256, requires_grad=True)
    nn.Sequential(*layers)(image)[0, 0, 15, 15].backward()
    rows, columns = image.grad[0].sum(dim=0).nonzero(as_tuple=True)
    assert len(rows.unique()) == len(columns.unique()) == 70

@each_generator
@pytest.mark.parametrize("size", [32, 64, 96, 128, 160, 256])
@torch.no_grad()
def test_networks_of_any_size_equal_the_textbooks(generator, size):
    model, book = make_pair(f"--generator {generator} --size {size}")
    images, _ = random_images(2, size)
    output = model.G_AB(images)
    assert output.shape == images.shape and output.abs().max() <= 1
    assert distance([output], [book.G_AB(images)]) < 1e-10
    assert model.D_A(images).shape == (2, 1, size // 8 - 2, size // 8 - 2)

class SpectralDiscriminator(cyclegan.PatchDiscriminator):
    """As a fork would write it."""
    def __init__(self, args):
        super().__init__(args)
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                spectral_norm(layer)

@pytest.mark.parametrize("Discriminator", [cyclegan.PatchDiscriminator, SpectralDiscriminator])
def test_initial_weights_are_normal_with_deviation_0_02(monkeypatch, Discriminator):
    monkeypatch.setattr(cyclegan, "PatchDiscriminator", Discriminator)
    torch.manual_seed(0)
    model = cyclegan.CycleGAN(flags("--size 64"))
    for network in (model.G_AB, model.D_B):
        kernels = [weight.flatten() for weight in network.parameters() if weight.ndim == 4]
        assert abs(torch.cat(kernels).std() - 0.02) < 1e-4
        assert abs(torch.cat(kernels).mean()) < 1e-4
        assert not any(bias.any() for bias in network.parameters() if bias.ndim == 1)

# ---- The image pool and the learning rate --------------------------------------------------------
def numbered_fakes(*numbers):
    """-> a batch of images with one pixel."""
    return torch.tensor(numbers).float().reshape(-1, 1, 1, 1)

def test_a_pool_of_size_0_is_off():
    pool = cyclegan.ImagePool(0)
    assert pool.query(numbered_fakes(1, 2)).flatten().tolist() == [1, 2]
    assert pool.images == []

def test_a_pool_that_is_not_full_returns_the_fakes_and_keeps_copies():
    pool = cyclegan.ImagePool(2)
    fakes = numbered_fakes(1, 2)
    assert pool.query(fakes).flatten().tolist() == [1, 2]
    fakes += 100
    assert torch.stack(pool.images).flatten().tolist() == [1, 2]

def test_a_full_pool_exchanges_each_fake_with_probability_one_half_and_loses_none():
    torch.manual_seed(0)
    pool = cyclegan.ImagePool(3)
    pool.query(numbered_fakes(0, 1, 2))
    fakes = numbered_fakes(*range(3, 2003))
    returned = pool.query(fakes)
    assert 900 < (returned != fakes).sum() < 1100
    assert sorted(torch.cat([returned, torch.stack(pool.images)])) == list(range(2003))

@pytest.mark.parametrize("words, lr_of_epochs", [
    ("--epochs 3 --epochs_decay 2", {0: 0.5, 2.9: 0.5, 3: 0.5, 3.5: 0.375, 4: 0.25, 4.9: 0.025}),
    ("--epochs 1 --epochs_decay 0", {0: 0.5, 0.9: 0.5})])
def test_the_learning_rate_is_constant_then_falls_linearly_to_0(words, lr_of_epochs):
    args = flags(f"--lr 0.5 {words}")
    for epoch, lr in lr_of_epochs.items():
        assert cyclegan.lr_at(epoch, args) == pytest.approx(lr)

# ---- Compiled networks, and networks that a fork adds --------------------------------------------
@pytest.fixture
def graphs(monkeypatch):
    """A list of the compiled graphs: of a cheap compiler, which fails at the fifth."""
    graphs = []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compile_module = nn.Module.compile
    def compile_graph(graph, inputs):
        assert len(graphs) < 4, "a fifth graph"
        graphs.append(graph)
        return aot_eager(graph, inputs)
    def compile_cheaply(network, **options):
        compile_module(network, backend=compile_graph, **options)
    monkeypatch.setattr(nn.Module, "compile", compile_cheaply)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()

def test_compiled_networks_train_and_save_the_same(data, graphs):
    """Whole networks, in four graphs: G for two images or for one, D frozen or not."""
    kernels = {"on": [], "off": []}
    for choice in kernels:      # and not biases: before a norm they get noise, which Adam scales up
        run(f"{SMALL} --dataA a --dataB b --amp off --max_steps 2 --out_dir {choice} "
            f"--compile {choice}")
        for state in torch.load(f"{choice}/generators.pt")["generators"].values():
            kernels[choice] += [state[name] for name in sorted(state) if state[name].ndim == 4]
    assert len(graphs) == 4
    assert distance(kernels["on"], kernels["off"]) < 1e-3

def test_a_compiler_that_fails_is_an_error_with_compile_on(data, graphs):
    graphs += "1234"
    with pytest.raises(RuntimeError, match="a fifth graph"):
        run(f"{SMALL} --dataA a --dataB b --max_steps 1 --compile on")

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
    for name in ("latest.pt", "generators.pt"):
        assert b"judge" not in Path("x", name).read_bytes()

def test_a_trainable_network_without_an_optimizer_fails_loudly():
    model = cyclegan.CycleGAN(flags(SMALL))
    model.judge = nn.Conv2d(3, 1, 1)
    with pytest.raises(AssertionError, match="freeze"):
        cyclegan.make_optimizers(model, flags(SMALL))

# ---- Runs ----------------------------------------------------------------------------------------
TRAIN = f"{SMALL} --dataA a --dataB b --out_dir run --amp off --pool_size 3 --log_every 2"
TRAIN += " --max_steps 30"               # in case that nothing stops it

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with images, a run of 3 epochs of 4 steps each, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_images("a", 7, seed=1)
        write_images("b", 5, seed=2)
        with open("printed", "w") as file, contextlib.redirect_stdout(file):
            run(f"{TRAIN} --batch_size 2 --epochs 1 --epochs_decay 2 --save_every 3 "
                "--sample_every 5")
    return folder

@pytest.fixture
def work(finished, tmp_path, monkeypatch):
    """A copy of that folder to work in."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

def load(path="run/latest.pt"):
    return torch.load(path, weights_only=True)

def column(name):
    """-> the cells of a column of run/log.csv."""
    with open("run/log.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]

def end_of(folder):
    """-> all that a run ends with: weights, optimizers, pools and log, without its times."""
    parts = load(f"{folder}/latest.pt")["parts"]
    for row in parts["log"]["rows"]:
        del row["waiting"], row["img/s"]
    return parts

def refusal(words, capsys):
    """Runs a command line that must end with one line on stderr and status 2 -> the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(words)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("cyclegan.py: ")
    return line

def before_call(patch, name, number, act):
    """Makes call `number` of cyclegan.<name> begin with act(*its arguments), or with a signal."""
    original = operator.attrgetter(name)(cyclegan)
    calls = itertools.count(1)
    def changed(*args, **options):
        if next(calls) == number:
            if isinstance(act, signal.Signals):
                os.killpg(0, act)       # all processes of a run, as terminals and schedulers do
            else:
                act(*args)
        return original(*args, **options)
    patch.setattr(f"cyclegan.{name}", changed)

def test_red_squares_become_blue(data):
    write_images("red", 30, (230, 30, 30), seed=1)
    write_images("blue", 30, (30, 30, 230), seed=2)
    run("--dataA red --dataB blue --out_dir run --size 32 --load_size 32 --ngf 8 --ndf 8 --amp off "
        "--blocks 0 --upsample nearest --batch_size 2 --lr 4e-3 --max_steps 100 --device cpu")
    run("--checkpoint run --input red --output out --device cpu")
    for i in range(4):
        image = Image.open(f"red/{i:03}.png").resize((32, 32), Image.Resampling.BICUBIC)
        before = np.array(image, dtype=int)
        after = np.array(Image.open(f"out/{i:03}.png"), dtype=int)
        square = before[..., 0] > 210
        assert (after[square][:, 2] > after[square][:, 0] + 60).mean() > 0.9, "red becomes blue"
        assert np.abs(after - before)[~square].mean() < 45, "the rest stays as it was"

def test_a_run_writes_its_checkpoints_samples_and_log(work):
    assert set(os.listdir("run")) == {"latest.pt", "generators.pt", "log.csv", "samples"}
    samples = sorted(os.listdir("run/samples"))
    assert samples == ["step_0000005.png", "step_0000010.png", "step_0000012.png"]
    assert Image.open("run/samples/step_0000012.png").size == (6 * 34 + 2, 6 * 34 + 2)
    assert column("step") == ["2", "3", "4", "6", "8", "9", "10", "12"]     # 3, 9: checkpoints
    assert Path("run/log.csv").read_text().splitlines()[0].split(",") == (
        "step epoch lr adv_AB adv_BA cycle_A cycle_B idt_A idt_B D_A D_B D(real) D(fake) "
        "waiting img/s").split()
    assert load()["pairs_seen"] == 24
    assert load("run/generators.pt")["generators"].keys() == {"G_AB", "G_BA"}

def test_the_terminal_shows_the_schedule_and_15_columns(work):
    first, second, *table, last = Path("printed").read_text().splitlines()
    assert "7 images of A, 5 of B; 2 pairs per step on 1 x cpu, precision off" in first
    assert second == ("1 epochs at learning rate 0.0002, then 2 down to 0, 4 steps each; "
                      "12 steps to go from epoch 0.00")
    assert [len(line.split()) for line in table] == [15] * 9
    assert max(len(line) for line in table) <= 120

def test_a_row_of_the_log_holds_the_means_since_the_row_before():
    log = cyclegan.Log()
    for step in range(1, 7):
        log.add({"D_A": torch.tensor(float(step))}, data_time=0.0)
        if step in (2, 6):
            log.end_row(step, 0.1, 0.5, 4, cyclegan.Runtime(flags(SMALL)))
    assert [(row["D_A"], row["lr"]) for row in log.rows] == [(1.5, 0.5), (4.5, 0.5)]

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
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)    # for the loader
    with open(f"out{rank}", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if rank == n - 1:
        for name, number, act in hooks:
            before_call(pytest.MonkeyPatch(), name, number, act)
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

@pytest.mark.parametrize("words", ["--workers 2", "--workers 0 --amp fp16"])
def test_a_run_stopped_and_killed_anywhere_ends_as_one_that_never_stopped(data, words):
    words = f"{TRAIN} --epochs 1 --epochs_decay 1 --save_every 4 --sample_every 5 {words}"
    assert launch(f"{words} --workers 0 --out_dir whole")[0] == [0]
    statuses, outputs = launch(words, ("train_step", 2, signal.SIGTERM))
    assert statuses == [143]
    assert "stopped after step 2 and saved; continue with:\npython cyclegan.py --" in outputs[0]
    for name, number in [("train_step", 3), ("torch.save", 1), ("os.replace", 3), ("save_png", 1)]:
        assert launch("--resume run", (name, number, signal.SIGKILL))[0] == [-9]
    for stop in (signal.SIGINT, signal.SIGHUP):
        assert launch("--resume run", ("train_step", 2, stop))[0] == [128 + stop]
    assert launch("--resume run")[0] == [0]
    torch.testing.assert_close(end_of("run"), end_of("whole"), rtol=0, atol=0)
    assert len(end_of("run")["pool_A"]["images"]) == 3
    assert column("step") == ["2", "4", "6", "8", "10", "12", "14"]

@pytest.mark.parametrize("number, status", [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_a_second_ctrl_c_ends_at_once_but_a_second_sigterm_does_not(data, number, status):
    assert launch(TRAIN, ("train_step", 1, number), ("torch.save", 1, number))[0] == [status]
    assert os.path.exists("run/latest.pt") == (status == 143)

def test_ctrl_c_answers_at_once_and_the_old_handlers_come_back(data, monkeypatch, capfd):
    answers = []
    def press_ctrl_c(*_):
        signal.raise_signal(signal.SIGINT)
        answers.append(capfd.readouterr().err)
    before_call(monkeypatch, "train_step", 2, press_ctrl_c)
    handlers = [signal.getsignal(number) for number in cyclegan.STOP_SIGNALS]
    assert run(TRAIN) == 130
    assert "finishing this step, then saving; press Ctrl-C again" in answers[0]
    assert load()["pairs_seen"] == 2
    assert [signal.getsignal(number) for number in cyclegan.STOP_SIGNALS] == handlers

def test_a_run_started_with_nohup_survives_its_terminal(data, monkeypatch):
    before_call(monkeypatch, "train_step", 1, lambda *_: signal.raise_signal(signal.SIGHUP))
    old_handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)      # as nohup does
    status = run(f"{TRAIN} --max_steps 2")
    signal.signal(signal.SIGHUP, old_handler)
    assert status == 0

def test_a_thread_other_than_the_main_one_trains_and_translates(data):
    statuses = []
    def train_and_translate():
        statuses.append(run(f"{TRAIN} --max_steps 1"))
        statuses.append(run("--checkpoint run --input b --output out --device cpu"))
    thread = threading.Thread(target=train_and_translate)
    thread.start()
    thread.join()
    assert statuses == [0, 0]

def nan_in_images(model, optimizers, pools, runtime, real_A, real_B, step):
    real_A.fill_(float("nan"))

def nan_in_weights(args, generators, parts, *_):
    parts["D_A"][0].bias.data.fill_(float("nan"))

def limit_files(*_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))

def refuse(*_):
    raise PermissionError("locked")

@pytest.mark.parametrize("name, number, act, word", [
    ("train_step", 4, nan_in_images, "step 4: "), ("save_checkpoint", 2, nan_in_weights, "D_A is"),
    ("torch.save", 3, limit_files, "latest.pt"), ("os.replace", 3, refuse, "latest.pt (locked)")])
def test_what_stops_a_run_is_one_line_and_the_last_checkpoint_is_kept(
        data, monkeypatch, capsys, name, number, act, word):
    before_call(monkeypatch, name, number, act)
    line = refusal(f"{TRAIN} --save_every 2", capsys)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert word in line
    assert load()["pairs_seen"] == 2
    assert not os.path.exists("run/latest.pt.part")

def test_a_full_disk_is_one_line_before_training(data, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**5))
    assert "disk full" in refusal(TRAIN, capsys)

def test_a_bug_shows_its_traceback_and_ends_the_run_and_its_workers(data):
    statuses, outputs = launch(f"{TRAIN} --workers 2", ("train_step", 2, refuse))
    assert statuses == [1]
    assert "Traceback" in outputs[0] and "PermissionError: locked" in outputs[0]

# ---- Runs that continue --------------------------------------------------------------------------
def test_a_finished_run_says_so_and_refuses_flags_that_would_change_nothing(work, capsys):
    assert run("--resume run/latest.pt") == 0
    assert "finished 12 steps" in capsys.readouterr().out
    line = refusal("--resume run --lambda_cycle 5", capsys)
    assert "lambda_cycle" in line and "--out_dir" in line

def test_a_run_continues_elsewhere_with_other_flags_on_the_schedule(work):
    os.rename("a", "moved_a")
    os.rename("run", "moved")
    for words in ["--epochs_decay 3 --amp bf16 --max_steps 13 --dataA moved_a",
                  "--max_steps 14 --amp fp16 --lambda_identity 0 --workers 1",
                  "--max_steps 15 --load_size 40 --lambda_identity 1 --pool_size 2",
                  "--max_steps 1000 --amp off"]:
        assert run(f"--resume moved {words}") == 0
    os.rename("moved", "run")
    assert column("step")[-4:] == ["13", "14", "15", "16"]
    assert [cell == "" for cell in column("idt_A")[-4:]] == [False, True, False, False]
    rates = [float(cell) for cell in column("lr")[-4:]]
    assert rates == pytest.approx([2e-4 * (1 - k / 12) for k in (8, 9, 10, 11)])
    assert len(load()["parts"]["pool_A"]["images"]) == 2

def test_another_number_of_images_is_a_line_and_the_run_continues(work, capsys):
    write_images("more", 6)
    assert run("--resume run --dataB more --epochs 2 --max_steps 13") == 0
    assert "[7, 6] images of A and B, [7, 5] before" in capsys.readouterr().out
    assert load()["n_images"] == [7, 6]

@pytest.mark.parametrize("flag", ["--generator unet", "--blocks 2", "--ngf 3", "--ndf 3",
                                  "--size 36", "--upsample nearest", "--seed 1", "--out_dir new"])
def test_what_cannot_be_changed_when_resuming_is_named(work, capsys, flag):
    line = refusal(f"--resume run --epochs 9 {flag}", capsys)
    assert f"{flag.split()[0]} cannot be changed" in line

@pytest.mark.parametrize("section", ["flags", "parts"])
@pytest.mark.parametrize("name", ["new", "beta1", "pool_A"])
def test_a_checkpoint_of_another_version_is_one_line(work, capsys, section, name):
    checkpoint = load()
    if name in checkpoint[section]:
        del checkpoint[section][name]
    else:
        checkpoint[section][name] = {}
    torch.save(checkpoint, "run/latest.pt")
    assert name in refusal("--resume run --epochs 9", capsys)

def test_only_latest_pt_can_be_resumed(work, capsys):
    shutil.copy("run/latest.pt", "run/copy.pt")
    assert "run/copy.pt" in refusal("--resume run/copy.pt", capsys)
    shutil.copy("run/generators.pt", "run/latest.pt")
    assert "another version" in refusal("--resume run", capsys)

@pytest.mark.parametrize("name", ["latest.pt", "generators.pt"])
def test_a_new_run_never_overwrites_a_checkpoint(work, capsys, name):
    os.remove(f"run/{name}")            # the other one remains
    assert "--resume" in refusal(TRAIN, capsys)

def test_a_run_is_not_written_into_its_data(data, capsys):
    assert "choose another folder" in refusal(f"{TRAIN} --out_dir a/run", capsys)

@pytest.mark.parametrize("folder_A, folder_B, name", [
    ("a", "b", "a2b"), ("horse2zebra/trainA", "horse2zebra/trainB", "horse2zebra")])
def test_a_run_is_named_after_its_data(data, folder_A, folder_B, name):
    write_images(folder_A, 1)
    write_images(folder_B, 1)
    run(f"--dataA {folder_A} --dataB {folder_B} --max_steps 1 {SMALL}")
    assert os.listdir("runs") == [name]

def test_a_checkpoint_of_a_gpu_continues_without_one(data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        run(f"{TRAIN} --max_steps 2")
    assert b"cuda:0" in Path("run/latest.pt").read_bytes()
    assert run("--resume run --max_steps 3") == 0

@needs_cuda
def test_cuda_tensors_are_averaged_by_nccl():
    """A group of one process stands in for two, so that the mean is half of the sum."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    runtime = cyclegan.Runtime(flags("--device cuda:0"))
    runtime.world_size = 2
    gradient = torch.ones(3, device=runtime.device)
    runtime.average([gradient])
    torch.distributed.destroy_process_group()
    assert gradient.tolist() == [0.5, 0.5, 0.5]

@needs_cuda
def test_a_run_moves_from_cuda_to_the_cpu_and_back(data):
    run(f"{TRAIN} --max_steps 2 --device cuda --workers 2")
    run("--resume run --max_steps 4 --device cpu")
    run("--resume run --max_steps 6 --device cuda --compile on")
    assert column("step") == ["2", "4", "6"]

# ---- Two processes -------------------------------------------------------------------------------
def five_steps(module, args, runtime):
    """-> what the networks answer after five steps in float64, each on this process's share of two
    pairs. Not the weights: biases before a norm are rounding noise."""
    torch.manual_seed(0)
    model = module.CycleGAN(args).double()
    optimizers = module.make_optimizers(model, args)
    pools = dict.fromkeys("AB", module.ImagePool(0))
    for step in range(5):
        pair = [x[runtime.rank::runtime.world_size] for x in random_images(2, 32, seed=step)]
        module.train_step(model, optimizers, pools, runtime, *pair, step)
    x = random_images(1, 32)[0]
    return [network(x) for network in (model.G_AB, model.G_BA, model.D_A, model.D_B)]

def save_five_steps(words):
    args = cyclegan.get_args(words)
    runtime = cyclegan.Runtime(args)
    torch.save(five_steps(cyclegan, args, runtime), f"{runtime.world_size}{runtime.rank}.pt")

def test_two_processes_step_as_one_with_twice_the_batch(data):
    for n in (1, 2):
        launch(TRAIN, n=n, main=save_five_steps)
    assert 0 < distance(load("20.pt"), load("10.pt")) < 1e-10
    assert distance(load("21.pt"), load("20.pt")) == 0

def overflow_in_one(words):
    """Prints a weight and the scale after each of three updates; rank 1 overflows in the second."""
    runtime = cyclegan.Runtime(cyclegan.get_args(words))
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([weight], lr=0.25, fused=True)
    for gradient in (1.0, float("inf") if runtime.rank == 1 else 1.0, 1.0):
        runtime.backward(weight.sum() * gradient)
        runtime.step(optimizer)
        print(f"{weight.item():.2f}", runtime.scaler.get_scale())

def test_two_processes_skip_an_overflow_together(data):
    outputs = launch(f"{TRAIN} --amp fp16", n=2, main=overflow_in_one)[1]
    assert outputs == ["0.75 65536.0\n0.75 32768.0\n0.50 32768.0\n"] * 2

class Numbers(list):
    args = flags(f"{SMALL} --batch_size 3")

def test_each_item_is_loaded_by_one_process():
    data = Numbers((n, -n) for n in range(99))
    items = []
    for rank in (0, 1):
        runtime = types.SimpleNamespace(
            rank=rank, world_size=2, is_cuda=False, to_float=torch.Tensor.tolist)
        for real_A, real_B in cyclegan.load_batches(data, range(3, 6), runtime):
            items += real_A
    assert sorted(items) == list(range(12, 30))     # steps 3, 4 and 5, each of 6 items

def test_two_processes_stop_together_and_continue_exactly(data):
    words = f"{TRAIN} --pool_size 0 --epochs 1 --epochs_decay 1"    # only rank 0's pools are saved
    assert launch(f"{words} --out_dir whole", n=2)[0] == [0, 0]
    statuses, outputs = launch(words, ("train_step", 2, signal.SIGTERM), n=2)
    assert statuses == [143, 143]
    assert "stopped after step 2 and saved" in outputs[0]
    assert launch("--resume run", n=2)[0] == [0, 0]
    torch.testing.assert_close(end_of("run"), end_of("whole"), rtol=0, atol=0)

def test_a_process_says_that_it_lost_the_others(data):
    statuses, outputs = launch(TRAIN, ("train_step", 2, signal.SIGKILL), n=2)
    assert statuses == [2, -9]
    assert outputs[0].splitlines()[-1].startswith("cyclegan.py: lost the other processes")

def test_processes_with_other_numbers_of_images_end_instead_of_waiting(data):
    write_images("a1", 6)
    os.rename("a", "a0")
    statuses, outputs = launch(TRAIN.replace("--dataA a", "--dataA a{rank}"), n=2)
    assert statuses == [2, 2]
    assert outputs[1].startswith("cyclegan.py: this process found [6, 5] images of A and B, others")

def wait(*_):
    cyclegan.time.sleep(0.5)

def test_two_processes_translate_every_image_once(work):
    words = "--checkpoint run --input a --output out --device cpu"
    statuses, outputs = launch(words, ("name_images", 1, wait), n=2)
    assert statuses == [0, 0]
    assert "translated 4 of 4" in outputs[0] and "translated 3 of 3" in outputs[1]
    assert len(os.listdir("out")) == 7

def test_torchrun_stops_on_ctrl_c_and_says_how_to_continue(data):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"{ROOT}/cyclegan.py", *TRAIN.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = ""
    for line in process.stdout:
        output += line
        if line.split()[:1] == ["2"]:   # the row of step 2
            process.send_signal(signal.SIGINT)
    process.wait()
    step = load()["pairs_seen"] // 2
    assert f"stopped after step {step} and saved; continue with:\npython cyclegan.py" in output

# ---- Bad input -----------------------------------------------------------------------------------
POINTER = b"version https://git-lfs.github.com/spec/v1"
BROKEN = ["cut1.jpg", "cut2.png", "cut3.webp", "empty.jpg", "page.jpg", "pointer.jpg"]
NO_CHECKPOINT = {
    "page": b"<html>", "cut": b"PK\3\4", "list": [1], "numbers": {1: 2, "x.weight": 3},
    "fork": {"flags": {"generator": "x"}, "generators": {}, "parts": {}},
    "old_layout": {"args": {"generator": "resnet"}, "model": {"G.AB.x": torch.ones(1)}},
    "classifier": {f"{i}.weight": torch.ones(8, 8, 3, 3) for i in range(9)},
    "too_much": textbook_resnet(flags("--ngf 4 --blocks 1")).state_dict() | {"f": torch.ones(3, 3)}}

@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Folders of images, the runs resnet and unet, and what is no checkpoint."""
    top = tmp_path_factory.mktemp("top")
    for name in ("A", "B", "own", "bad", "empty", *NO_CHECKPOINT):
        (top / name).mkdir()
    write_images(top / "B", 2)
    image = Image.open(top / "B/000.png")
    for name in ("A/000.png", "A/000_back.png", "own/000.jpg", "own/000.png", "own/001_back.png"):
        image.save(top / name)
    for name in BROKEN[:3]:
        image.save(top / "bad" / name)
        os.truncate(top / "bad" / name, 300)
    for name, content in zip(BROKEN[3:], [b"", b"<html>", POINTER]):
        (top / "bad" / name).write_bytes(content)
    for name, content in NO_CHECKPOINT.items():
        torch.save(content, top / name / "latest.pt")
        if isinstance(content, bytes):
            (top / name / "latest.pt").write_bytes(content)
    torch.save(textbook_resnet(flags("--ngf 2 --blocks 1")).state_dict(), top / "foreign.pth")
    words = f"{SMALL} --dataA {top}/A --dataB {top}/B --max_steps 2 --out_dir {top}"
    assert run(f"{words}/resnet") == 0
    assert run(f"{words}/unet --generator unet --resize crop") == 0
    return top

# A command, and what the message must name.
BAD_INPUT = """
-> --dataA
--dataA x -> --dataB
--mode translate -> --checkpoint
--checkpoint x -> --input
--checkpoint x --input y -> --output
{train} --bogus -> --bogus
{train} --batch 3 -> --batch
{train} --epochs 0 --epochs_decay 0 -> --epochs
{train} --out_dir= -> --out_dir
{train} --beta1 1 -> --beta1
{train} --size 34 -> --size
{train} --size 48 --load_size 60 --generator unet -> --size
{train} --load_size 35 --size 36 -> --load_size
{train} --device 0 -> --device
{train} --device cuda:99 -> --device
{train} --device hpu -> --device
{train} --device meta -> --device
{train} --dataA {top}/none -> {top}/none
{train} --dataB {top}/empty -> {top}/empty
{train} --dataB {top}/A -> {top}/A/000.png
{train} --out_dir {top}/A/x -> {top}/A
{train} --out_dir {top}/unet -> {top}/unet
{train} --out_dir {top}/foreign.pth/x -> {top}/foreign.pth/x
--resume {top}/none -> {top}/none
--resume {top}/unet/generators.pt -> {top}/unet/generators.pt
--resume {top}/resnet --ngf 3 -> --ngf
--resume {top}/resnet --dataA {top}/own -> dataA
{translate} --input {top}/none -> {top}/none
{translate} --input {top}/empty -> {top}/empty
{translate} --input {top}/own -> {top}/own/000.png
{translate} --input {top}/own/000.jpg --output {top}/own -> {top}/own/000.png exists
{translate} --input {top}/B/001.png --output {top}/own --round_trip -> {top}/own/001_back.png exists
{translate} --round_trip -> 000_back.png
{translate} --output {top}/A -> {top}/A
{translate} --output {top}/A/x -> {top}/A
{translate} --output {top}/foreign.pth/x -> {top}/foreign.pth/x
{translate} --truth {top}/none -> {top}/none
{translate} --truth {top}/bad -> --truth
{translate} --truth {top}/B --output {top}/B/ -> {top}/B
{translate} --checkpoint {top}/foreign.pth --round_trip -> --round_trip
""".strip().splitlines()

def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(top, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    case = case.format(
        top=top, train=f"{SMALL} --dataA {top}/A --dataB {top}/B",
        translate=f"--checkpoint {top}/unet --input {top}/A --output out --device cpu")
    command, named = case.split("-> ")
    before = modification_times(top)
    assert named in error_line(capsys, command)
    assert os.listdir() == [] and modification_times(top) == before

@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_what_is_no_checkpoint_is_refused_in_one_line(top, capsys, name):
    translate = f"--input {top}/A --output {top}/o --device cpu --checkpoint"
    assert f"{top}/{name}/latest.pt" in error_line(capsys, f"{translate} {top}/{name}/latest.pt")
    line = error_line(capsys, f"--resume {top}/{name}")
    assert f"{top}/{name}" in line or "another version of cyclegan.py" in line

@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_reported_and_replaced_in_training(top, data, capfd, workers):
    words = f"{SMALL} --dataA a {top}/bad --dataB b --out_dir run --max_steps 13"
    assert run(f"{words} --workers {workers}") == 0
    reported = re.findall("/bad/(.*?): .*; another image is used instead", capfd.readouterr().err)
    assert set(reported) == set(BROKEN)

def test_a_folder_without_a_readable_image_ends_the_run(top, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(f"{SMALL} --dataA {top}/bad --dataB b")
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == f"cyclegan.py: {top}/bad: gave up after 100 unreadable images"

# ---- Translating ---------------------------------------------------------------------------------
def translate(top, words):
    return run(f"--checkpoint {top}/resnet --output out --device cpu {words}")

@pytest.mark.parametrize("words, sizes", [
    ("", (32, 32)), ("--size 64 --resize crop", (64, 64)), ("--native", None)])
def test_translating_keeps_folders_and_names_and_if_native_sizes(top, data, words, sizes):
    images = {"in/s/ü.jpg": (7, 5), "in/s/1.png": (1, 1), "in/a.b.bmp": (3, 9), "2.webp": (33, 50)}
    os.makedirs("in/s")
    expected = {}
    for name, size in images.items():
        Image.new("RGB", size).save(name)
        stem = name.removeprefix("in/").rpartition(".")[0]
        expected[f"out/{stem}.png"] = expected[f"out/{stem}_back.png"] = sizes or size
    assert translate(top, f"--input in 2.webp {words} --round_trip") == 0
    assert {str(path): Image.open(path).size for path in Path("out").rglob("*.*")} == expected

@pytest.mark.parametrize("checkpoint, ways", [
    ("resnet/generators.pt", ["AtoB", "BtoA"]), ("resnet/latest.pt", ["BtoA", "AtoB"]),
    ("unet", ["AtoB", "BtoA"])])                # trained with --resize crop
def test_a_translation_is_the_output_of_the_generator(top, data, checkpoint, ways):
    checkpoint = f"{top}/{checkpoint}"
    words = f"--checkpoint {checkpoint} --direction {ways[0]} --round_trip --input a/000.png"
    assert translate(top, words) == 0
    generators, args = cyclegan.load_generators(checkpoint)
    image = cyclegan.read_image("a/000.png")
    x = cyclegan.preprocess(image, argparse.Namespace(**args))[None] / 127.5 - 1
    for way, path in zip(ways, ["out/000.png", "out/000_back.png"]):
        x = generators[way](x).detach()
        levels = (x[0].permute(1, 2, 0) + 1) * 127.5
        assert levels_apart(Image.open(path), levels.numpy()) <= 1
        assert levels.std() > 2

def test_each_direction_of_a_run_has_its_own_generator(top):
    stored = torch.load(top / "unet/generators.pt", weights_only=True)["generators"]
    for direction, G in cyclegan.load_generators(f"{top}/unet")[0].items():
        states = stored[{"AtoB": "G_AB", "BtoA": "G_BA"}[direction]]
        assert distance(G.state_dict().values(), states.values()) == 0

def test_unreadable_images_are_reported_and_skipped_in_translating(top, data, capsys):
    assert translate(top, f"--input a {top}/bad") == 1
    text = capsys.readouterr()
    assert re.findall("/bad/(.*?):", text.err) == BROKEN
    assert "translated 7 of 13 images" in text.out
    assert len(os.listdir("out")) == 7

@pytest.mark.parametrize("n_changed, psnr, inside, outside", [
    (16, "21.2 dB, mean absolute error 0.150", "0.300 (75.0%", "0.100"),
    (64, "16.5 dB, mean absolute error 0.300", "0.300 (75.0%", "0.000"),
    (0, "26.0 dB, mean absolute error 0.100", "0.000 (0.0%", "0.100")])
def test_the_error_against_ground_truth(top, data, capsys, monkeypatch, n_changed, psnr, inside,
                                        outside):
    monkeypatch.setattr(cyclegan, "translate_any", lambda G, x: x + 0.1)
    pixels = np.full((64, 1, 3), 102, np.uint8)
    for folder in ("input", "truth"):
        os.mkdir(folder)
        Image.fromarray(pixels).save(f"{folder}/1.png")
        pixels[:n_changed] = 153                # by 0.4, in the range from -1 to 1
    assert translate(top, "--input input --truth truth --native") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"compared 1: PSNR {psnr} (images from -1 to 1)",
        f"inside the changed region: error {inside} of leaving it unchanged); "
        f"outside: error {outside}"]

def test_a_ground_truth_of_another_size_is_not_compared(top, data, capsys):
    write_images("truth", 1, size=(40, 35))
    assert translate(top, "--input a --truth truth --native") == 0
    assert "compared" not in capsys.readouterr().out

@pytest.mark.parametrize("kind", ["resnet", "old", "nearest", "down_blocks", "unet"])
def test_a_generator_of_other_code_gives_the_same_here(tmp_path, kind):
    """The official ResNet, its first version, PyTorch-GAN's, a book's, the official U-Net."""
    upsample = "nearest" if kind == "nearest" else "deconv"
    network = textbook_resnet(flags(f"--ngf 4 --blocks 2 --upsample {upsample}"))
    if kind == "unet":
        network = TextbookUNet(flags("--ngf 4 --size 32 --generator unet"))
    state = {f"{kind}.{name}": value for name, value in network.state_dict().items()}
    if kind == "old":                           # its instance norm stored statistics in vain
        state = {"running_mean": torch.ones(4), "batches": torch.tensor(1)} | state
    torch.save(state, tmp_path / "G.pth")
    for layer in network.modules():
        if kind == "down_blocks" and type(layer) is nn.Conv2d and layer.stride == (2, 2):
            layer.padding_mode = "reflect"
    generators, stored = cyclegan.load_generators(tmp_path / "G.pth")
    x = random_images(2, 64)[0]
    y = generators["AtoB"].double()(x)
    assert distance([y], [network.double()(x)]) < 1e-9
    assert y.std() > 0.1 and stored is None

# ---- Forks ---------------------------------------------------------------------------------------
# Changes as a stranger would make them. The README shows two of them.
DIFFS = '''
fork spectral_norm: spectral norm in the discriminators (Miyato et al. 2018)
--- a/cyclegan.py
+++ b/cyclegan.py
@@ -378,2 +378,5 @@
             nn.Conv2d(8 * n, 1, 4, stride=1, padding=1))        # (N,   1, H/8-2, W/8-2)
+        for layer in self:
+            if isinstance(layer, nn.Conv2d):
+                nn.utils.parametrizations.spectral_norm(layer)
 

fork hinge_r1: hinge loss, with an R1 penalty: --gan_loss hinge --r1_every 16
--- a/cyclegan.py
+++ b/cyclegan.py
@@ -124,2 +124,3 @@
     add("lambda_identity", 0.5, "identity, relative to lambda_cycle (default: 0.5)")
+    add("r1_every", 16, "steps between penalties of D's gradient (default: 16)")
     add("pool_size", 50, "earlier fakes kept for training D; 0 is off (default: 50)", natural)
@@ -450,4 +451,17 @@
 
+def hinge(scores, target):
+    return F.relu(1 - (2 * target - 1) * scores).mean()
+
+def hinge_G(scores, target):
+    return -scores.mean()
+
+def r1_penalty(D, real):
+    """Mescheder et al. 2018: the squared gradient of D at real images."""
+    real = real.requires_grad_()
+    gradient, = torch.autograd.grad(D.forward(real).sum(), real, create_graph=True)
+    return gradient.square().sum(dim=(1, 2, 3)).mean()
+
 # name: (loss of D, loss of G). Focal and GHM-C are for D; their G gets plain cross-entropy.
-GAN_LOSSES = {"lsgan": (lsgan, lsgan), "bce": (bce, bce), "focal": (focal, bce), "ghm": (ghm, bce)}
+GAN_LOSSES = {"lsgan": (lsgan, lsgan), "bce": (bce, bce), "focal": (focal, bce), "ghm": (ghm, bce),
+              "hinge": (hinge, hinge_G)}
 
@@ -517,2 +531,5 @@
         loss, terms_D = model.discriminator_loss(real_A, real_B, fake_A, fake_B)
+    if step % runtime.args.r1_every == 0:
+        terms_D["R1"] = r1_penalty(model.D_A, real_A) + r1_penalty(model.D_B, real_B)
+        loss = loss + 0.5 * runtime.args.r1_every * terms_D["R1"]
     runtime.backward(loss)

fork perceptual: perceptual loss of the cycle, from a frozen VGG-16
--- a/cyclegan.py
+++ b/cyclegan.py
@@ -52,2 +52,3 @@
 from torch import nn
+from torchvision import models
 from torchvision import transforms as T
@@ -464,2 +465,3 @@
             network.apply(init_weights)
+        self.vgg = models.vgg16(weights="DEFAULT").features[:16].eval().requires_grad_(False)
         self.d_loss, self.g_loss = GAN_LOSSES[args.gan_loss]
@@ -467,2 +469,9 @@
         self.lambda_identity = args.lambda_cycle * args.lambda_identity     # the flag is relative
+
+    def perceptual_loss(self, x, y):
+        """Johnson et al. 2016: the distance between features of ImageNet; images in [-1, 1]."""
+        mean = x.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
+        std = x.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
+        x, y = (x / 2 + 0.5 - mean) / std, (y / 2 + 0.5 - mean) / std
+        return F.mse_loss(self.vgg(x), self.vgg(y))
 
@@ -482,3 +491,5 @@
                  "cycle_A": self.lambda_cycle * F.l1_loss(rec_A, real_A),
-                 "cycle_B": self.lambda_cycle * F.l1_loss(rec_B, real_B)}
+                 "cycle_B": self.lambda_cycle * F.l1_loss(rec_B, real_B),
+                 "vgg_A": self.perceptual_loss(rec_A, real_A),
+                 "vgg_B": self.perceptual_loss(rec_B, real_B)}
         if self.lambda_identity > 0:

fork ema: exponential moving average of the generators, for samples and translating
--- a/cyclegan.py
+++ b/cyclegan.py
@@ -31,2 +31,3 @@
 import contextlib
+import copy
 import csv
@@ -748,3 +749,3 @@
     pools = {"A": ImagePool(args.pool_size), "B": ImagePool(args.pool_size)}
-    generators = {"G_AB": model.G_AB, "G_BA": model.G_BA}       # for samples and for translating
+    generators = {"G_AB": copy.deepcopy(model.G_AB), "G_BA": copy.deepcopy(model.G_BA)}
     # All that a resumed run needs. With several processes, all of them get the pools of rank 0.
@@ -752,3 +753,4 @@
              "optimizer_G": optimizers["G"], "optimizer_D": optimizers["D"],
-             "scaler": runtime.scaler, "pool_A": pools["A"], "pool_B": pools["B"], "log": log}
+             "scaler": runtime.scaler, "pool_A": pools["A"], "pool_B": pools["B"], "log": log,
+             "average_AB": generators["G_AB"], "average_BA": generators["G_BA"]}
 
@@ -779,2 +781,6 @@
             terms = train_step(model, optimizers, pools, runtime, real_A, real_B, step)
+            with torch.no_grad():
+                for name, average in generators.items():
+                    for p, new_p in zip(average.parameters(), getattr(model, name).parameters()):
+                        p.lerp_(new_p, 0.001)
             log.add(terms, data_time)

fork wandb: log and samples to Weights & Biases
--- a/cyclegan.py
+++ b/cyclegan.py
@@ -770,2 +770,6 @@
 
+    if runtime.rank == 0:
+        import wandb
+        name = os.path.basename(args.out_dir)
+        wandb.init(project="cyclegan", id=name, resume="allow", config=vars(args))
     start_time = time.time()
@@ -792,4 +796,7 @@
                     log.write(f"{args.out_dir}/log.csv")
+                    wandb.log(log.rows[-1], step=step)
                 if is_last or step % args.sample_every == 0:
                     save_samples(args, step, generators, runtime, *samples)
+                    path = f"{args.out_dir}/samples/step_{step:07}.png"
+                    wandb.log({"samples": wandb.Image(path)}, step=step)
                 progress(f"step {step}/{total_steps}", start_time, step - start_step, len(steps))

fork accumulate: gradient accumulation and clipping: --batch_size 8 --accumulate 4 --clip 1
--- a/cyclegan.py
+++ b/cyclegan.py
@@ -130,2 +130,4 @@
     add("batch_size", 1, "pairs per step in each process (default: 1)")
+    add("accumulate", 1, "equal chunks of a batch, whose gradients are added up (default: 1)")
+    add("clip", 1.0, "largest norm of the gradient (default: 1)")
     add("lr", 2e-4, "learning rate of Adam (default: 2e-4)")
@@ -506,5 +508,3 @@
     model.D_B.requires_grad_(False)
-    with runtime.autocast():
-        loss, terms_G, fake_A, fake_B = model.generator_loss(real_A, real_B)
-    runtime.backward(loss)
+    terms_G, fake_A, fake_B = backward_chunks(model.generator_loss, runtime, real_A, real_B)
     runtime.step(optimizers["G"])
@@ -515,7 +515,15 @@
     fake_B = pools["B"].query(fake_B)
-    with runtime.autocast():
-        loss, terms_D = model.discriminator_loss(real_A, real_B, fake_A, fake_B)
-    runtime.backward(loss)
+    terms_D, = backward_chunks(model.discriminator_loss, runtime, real_A, real_B, fake_A, fake_B)
     runtime.step(optimizers["D"])
     return {name: term.detach() for name, term in (terms_G | terms_D).items()}
+
+def backward_chunks(loss_of, runtime, *batch):   # -> the mean terms over all chunks, all fakes
+    n, terms, fakes = runtime.args.accumulate, Counter(), []
+    for chunk in zip(*[images.chunk(n) for images in batch]):
+        with runtime.autocast():
+            loss, chunk_terms, *chunk_fakes = loss_of(*chunk)
+        runtime.backward(loss / n)
+        terms.update({name: term.detach() / n for name, term in chunk_terms.items()})
+        fakes.append(chunk_fakes)
+    return dict(terms), *map(torch.cat, zip(*fakes))
 
@@ -579,2 +587,4 @@
         self.average([p.grad for group in optimizer.param_groups for p in group["params"]])
+        self.scaler.unscale_(optimizer)
+        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.args.clip)
         self.scaler.step(optimizer)     # after averaging: an overflow is skipped everywhere

fork paired: paired data, with an L1 term as in pix2pix: --lambda_pair 100
--- a/cyclegan.py
+++ b/cyclegan.py
@@ -124,2 +124,3 @@
     add("lambda_identity", 0.5, "identity, relative to lambda_cycle (default: 0.5)")
+    add("lambda_pair", 100.0, "weight of the distance to the paired image (default: 100)")
     add("pool_size", 50, "earlier fakes kept for training D; 0 is off (default: 50)", natural)
@@ -238,5 +239,8 @@
             die(f"--dataA, --dataB: {path} is given twice")
+        if [path.stem for path in self.paths_A] != [path.stem for path in self.paths_B]:
+            die("--dataA, --dataB: the two images of a pair must have the same name")
 
     def __getitem__(self, n):
-        return self.load_item(self.paths_A, n, "A"), self.load_item(self.paths_B, n, "B")
+        # one seed for both, hence one order, one crop, one mirror
+        return self.load_item(self.paths_A, n, "A"), self.load_item(self.paths_B, n, "A")
 
@@ -250,4 +254,3 @@
             except OSError as error:    # one broken file must not end a long run
-                print(f"{error}; another image is used instead", file=sys.stderr, flush=True)
-                k = torch.randint(len(paths), ())
+                die(f"{error}; remove it and its pair")
             else:
@@ -466,2 +469,3 @@
         self.lambda_cycle = args.lambda_cycle
+        self.lambda_pair = args.lambda_pair
         self.lambda_identity = args.lambda_cycle * args.lambda_identity     # the flag is relative
@@ -486,2 +490,4 @@
             terms["idt_B"] = self.lambda_identity * F.l1_loss(idt_B, real_B)
+        terms["pair_A"] = self.lambda_pair * F.l1_loss(fake_A, real_A)
+        terms["pair_B"] = self.lambda_pair * F.l1_loss(fake_B, real_B)
         return sum(terms.values()), terms, fake_A.detach(), fake_B.detach()
'''
# name, lines that the diff may have, flags, a column of the log
FORKS = [("spectral_norm", 4, "", "D_A"), ("hinge_r1", 22, "--gan_loss hinge --r1_every 2", "R1"),
         ("perceptual", 16, "", "vgg_A"), ("ema", 12, "", "D_A"), ("wandb", 10, "", "D_A"),
         ("accumulate", 22, "--accumulate 2 --batch_size 2", "D_A"), ("paired", 26, "", "pair_B")]

def read_diff(name):
    """-> the diff, as `git apply` takes it."""
    return re.search(rf"fork {name}: .*?(?=\nfork |\Z)", DIFFS, re.DOTALL)[0].rstrip("\n") + "\n"

def apply_fork(name):
    """-> cyclegan.py with the diff of that name, as a module."""
    shutil.copy(ROOT / "cyclegan.py", ".")
    subprocess.run(["git", "apply"], input=read_diff(name), text=True, check=True)
    fork = types.ModuleType(name)
    exec(Path("cyclegan.py").read_text(), fork.__dict__)
    return fork

@pytest.fixture
def wandb(data, monkeypatch):
    """Stands in for what forks import or download."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    write_images("b", 7, seed=2)        # as many as in a, for pairs
    vgg = types.SimpleNamespace(features=torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))
    monkeypatch.setattr("torchvision.models.vgg16", lambda weights: vgg)
    fake = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake

@pytest.mark.parametrize("name, n_lines, words, term", FORKS)
def test_a_fork_is_short_trains_resumes_exactly_and_translates(wandb, name, n_lines, words, term):
    assert len(re.findall("^[+-](?!--|[+][+])", read_diff(name), re.MULTILINE)) <= n_lines
    fork = apply_fork(name)
    train = f"{TRAIN} {words} --log_every 1"
    for command in [f"{train} --out_dir whole --max_steps 3", f"{train} --max_steps 2",
                    "--resume run --max_steps 3",
                    "--checkpoint run --input b --output out --device cpu"]:
        assert fork.main(command.split()) == 0
    torch.testing.assert_close(end_of("run"), end_of("whole"), rtol=0, atol=0)
    assert float(column(term)[1]) > 0
    assert len(os.listdir("out")) == 7

def test_the_average_of_the_generators_is_what_samples_and_translations_use(wandb, monkeypatch):
    fork = apply_fork("ema")
    shown = {}
    def save_samples(args, step, generators, *rest):
        shown.update(generators)
    monkeypatch.setattr(fork, "save_samples", save_samples)
    fork.main(f"{TRAIN} --max_steps 1".split())
    torch.manual_seed(0)
    start = fork.CycleGAN(flags(SMALL)).G_AB.stem.weight
    end = load()["parts"]["G_AB"]["stem.weight"]
    average = fork.load_generators("run")[0]["AtoB"].stem.weight
    assert torch.equal(average, start.lerp(end, 0.001))
    assert torch.equal(average, shown["G_AB"].stem.weight)

def test_wandb_gets_the_flags_the_rows_and_the_samples(wandb):
    apply_fork("wandb").main(f"{TRAIN} --max_steps 4".split())
    rows = [call.args[0] for call in wandb.log.call_args_list]
    assert wandb.init.call_args.kwargs["config"]["ngf"] == 2
    assert rows[:2] == load()["parts"]["log"]["rows"]
    wandb.Image.assert_called_once_with(f"{os.getcwd()}/run/samples/step_0000004.png")

def test_accumulated_gradients_are_those_of_the_whole_batch(wandb):
    fork = apply_fork("accumulate")
    answers = []
    for n in (1, 2):
        args = fork.get_args(f"{TRAIN} --accumulate {n} --clip 1e6".split())
        answers.append(five_steps(fork, args, fork.Runtime(args)))
    assert 0 < distance(*answers) < 1e-10

def test_the_images_of_a_pair_get_one_crop_and_mirror(wandb):
    fork = apply_fork("paired")
    shutil.copytree("a", "same")
    items = fork.UnpairedImages(fork.get_args(f"{TRAIN} --dataB same".split()))
    for n in range(9):
        assert torch.equal(*items[n])

@pytest.mark.parametrize("name, word", [("hinge_r1", "r1_every"), ("ema", "average_AB")])
def test_the_original_refuses_to_resume_the_run_of_a_fork(wandb, capsys, name, word):
    apply_fork(name).main(f"{TRAIN} --max_steps 1".split())
    assert word in refusal("--resume run --max_steps 2", capsys)

def test_a_bug_in_preprocess_is_not_taken_for_an_unreadable_image(data, monkeypatch):
    def preprocess(image, args, augment):
        return undefined_name           # noqa: F821
    monkeypatch.setattr(cyclegan, "preprocess", preprocess)
    with pytest.raises(NameError):
        run(TRAIN)

# ---- CelebA --------------------------------------------------------------------------------------
# Ten images: 1 to 4 are black, 4 to 8 blond, 9 and 10 neither. 3 and 6 have glasses, the even ones
# are male. Image 0 is not in the list. The bytes of image i are its number and a dot, i times.
def attribute_list():
    lines = ["10", "Black_Hair Blond_Hair Eyeglasses Male"]
    for i in range(1, 11):
        has = [i < 5, 3 < i < 9, i in (3, 6), i % 2 == 0]
        lines.append(f"{i:06}.jpg " + " ".join(f"{2 * value - 1:2}" for value in has))
    return "\r\n".join(lines) + "\r\n"

CELEBA_TXT = attribute_list()
CELEBA_CSV = "image_id," + re.sub(" +", ",", CELEBA_TXT[4:]).replace("\r", "")
CELEBA_LIST = Path("files/list_attr_celeba.csv")
CELEBA_IMAGES = Path("files/img_align_celeba")

def content(i):
    return b"%d." % i * i

@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """A working folder two levels deep with files/img_align_celeba and a list."""
    work = tmp_path / "a/b"
    (work / CELEBA_IMAGES).mkdir(parents=True)
    monkeypatch.chdir(work)
    CELEBA_LIST.write_text(CELEBA_CSV)
    for i in range(11):
        (CELEBA_IMAGES / f"{i:06}.jpg").write_bytes(content(i))
    return tmp_path

def zip_images(path, folders=("x/x/",)):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bbox.csv", "another table")
        archive.writestr("list_attr.csv", CELEBA_CSV)
        for i in range(11):
            folder = folders[min(i, len(folders) - 1)]
            archive.writestr(f"{folder}{i:06}.jpg", content(i))

def numbers(*folders):
    """For each folder in files the numbers of its images, which have to be complete."""
    found = []
    for folder in folders:
        paths = sorted(Path("files", folder).iterdir())
        found.append([int(path.stem) for path in paths])
        assert [path.read_bytes() for path in paths] == [content(i) for i in found[-1]]
    return found

def assert_sorted_by_hair():
    assert numbers("black", "blond") == [[1, 2, 3, 4], [5, 6, 7, 8]]

def stamps():
    return {p: (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in Path("files").rglob("*")}

def prepare(command=""):
    prepare_celeba.main(command.split())

def prepare_error(command, capsys):
    """The one line of stderr with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        prepare(command)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("prepare_celeba.py: ") and error.count("\n") == 1
    return error

@pytest.mark.parametrize("text", [
    CELEBA_CSV, CELEBA_CSV.replace("-1", "0"), CELEBA_CSV.replace("\n", "\r\n"),
    CELEBA_TXT, CELEBA_TXT[4:], "\ufeff" + CELEBA_CSV])
def test_every_form_of_the_list_is_read(celeba, capsys, text):
    CELEBA_LIST.write_bytes(text.encode())
    prepare()
    printed = capsys.readouterr().out
    assert "Black_Hair: 4\nBlond_Hair: 4\nboth (kept in A): 1\nneither: 2\n" in printed
    assert_sorted_by_hair()

@pytest.mark.parametrize("ending", ["csv", "txt", "csv.zip", "txt.zip"])
def test_the_documented_places_are_found_without_flags(celeba, ending):
    shutil.rmtree(CELEBA_IMAGES)
    zip_images("files/img_align_celeba.zip")
    if ending.endswith("zip"):
        shutil.copy("files/img_align_celeba.zip", CELEBA_LIST)
    CELEBA_LIST.rename(f"files/list_attr_celeba.{ending}")
    prepare()
    assert_sorted_by_hair()

@pytest.mark.parametrize("missing", [CELEBA_LIST, CELEBA_IMAGES])
def test_without_celeba_one_line_says_where_to_get_it(celeba, capsys, missing):
    missing.rename("elsewhere")
    error = prepare_error("", capsys)
    for word in (str(missing), ".zip", "mmlab", "jessicali9530/celeba-dataset", "--toy 400"):
        assert word in error
    assert not capsys.readouterr().out

def test_a_tilde_is_the_home_folder(celeba, monkeypatch):
    monkeypatch.setenv("HOME", str(celeba))
    monkeypatch.setenv("USERPROFILE", str(celeba))
    CELEBA_IMAGES.rename(celeba / "images")
    CELEBA_LIST.rename(celeba / "list")
    prepare("--images=~/images --attributes=~/list --out=~/out")
    assert len(os.listdir(celeba / "out/black")) == 4

@pytest.mark.parametrize("link", ["copy", "hard", "symlink", "move"])
def test_images_are_copied_linked_or_moved(celeba, link):
    prepare(f"--link {link}")
    first = Path("files/black/000001.jpg")
    assert first.is_symlink() == (link == "symlink")
    assert first.stat().st_nlink == 1 + (link == "hard")
    assert len(os.listdir(CELEBA_IMAGES)) == (3 if link == "move" else 11)

@pytest.mark.parametrize("link", ["hard", "symlink"])
def test_images_that_cannot_be_linked_are_copied(celeba, monkeypatch, link):
    def fail(source, target):
        raise OSError("as between two disks")

    monkeypatch.setattr(os, link.replace("hard", "link"), fail)
    prepare(f"--link {link}")
    assert Path("files/black/000001.jpg").lstat().st_nlink == 1
    assert_sorted_by_hair()

@pytest.mark.parametrize("link, call", [
    ("copy", "replace"), ("hard", "replace"), ("symlink", "replace"),
    ("move", "replace"), ("move", "unlink")])
def test_a_rerun_finishes_what_was_interrupted_and_then_changes_nothing(
        celeba, monkeypatch, link, call):
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
    before = stamps()
    prepare(f"--link {link}")
    assert stamps() == before

    every = ["black", "blond", "black_test", "blond_test"]
    prepare(f"--link {link} --test 1")
    assert numbers(*every) == [[1, 2, 3], [5, 6, 7], [4], [8]]
    prepare(f"--link {link}")
    assert numbers(*every) == [[1, 2, 3, 4], [5, 6, 7, 8], [], []]

def test_moving_after_linking_never_loses_an_image(celeba):
    prepare("--link symlink")
    prepare("--link move")
    assert_sorted_by_hair()

def test_names_in_a_zip_cannot_escape(celeba):
    zip_images("z.zip", ["../", "../../", "/", "", "x/x/"])
    prepare("--images z.zip --attributes z.zip --link move")
    folders = {p.parent.name for p in celeba.rglob("*.jpg")}
    assert folders == {"black", "blond", "img_align_celeba"}
    assert_sorted_by_hair()

def test_a_doubled_folder_a_missing_image_and_a_foreign_one(celeba, capsys):
    CELEBA_IMAGES.rename("inner")
    CELEBA_IMAGES.mkdir()
    Path("inner").rename(CELEBA_IMAGES / "img_align_celeba")
    (CELEBA_IMAGES / "img_align_celeba/000002.jpg").unlink()
    Path("files/x").mkdir()
    Path("files/x/000011.jpg").write_bytes(content(11))
    prepare("--nameA x --nameB y --test 1 --limit 2")
    assert numbers("x", "x_test", "y", "y_test") == [[1, 3, 11], [4], [5, 6], [8]]
    assert "left out: 1\n" in capsys.readouterr().out

def test_attributes_are_chosen_by_presence_and_absence(celeba):
    prepare("--A Eyeglasses --B -Eyeglasses --where Male=0 --where Blond_Hair=0")
    assert numbers("eyeglasses", "no_eyeglasses") == [[3], [1, 9]]

@pytest.mark.parametrize("case", [
    "--attributes none -> none: No such", "--images none -> none: No such",
    "--images .. --out o -> --images ..", "--attributes html -> web page",
    "--attributes row -> 000010.jpg", "--attributes rows -> 9 rows of 10",
    "--attributes cut -> cut is damaged", "--attributes value -> damaged",
    "--attributes empty -> empty is cut short",
    "--images cut -> cut is damaged", "--images lfs -> is a git-lfs",
    "--images crc --out o -> (Bad CRC", "--A black_hair -> Black_Hair", "--test 4 -> 4",
    "--B -Glasses -> --B -Glasses", "--where No=1 -> --where No: ", "--where Male -> Male=1",
    "--link soft -> --link", "--A Male --B Male -> --nameB", "--out empty -> empty",
    "--nameA img_align_celeba --link move -> --nameA", "--out empty --toy 1 -> empty",
    "--test -1 -> --test", "--where Male=1 -> use another --out"])
def test_bad_input_is_one_line_and_changes_nothing(celeba, capsys, case):
    command, words = case.split(" -> ")
    zip_images("z.zip")
    Path("crc").write_bytes(Path("z.zip").read_bytes().replace(b"5.5.", b"5.6."))
    Path("html").write_text("\n<!DOCTYPE html>")
    Path("lfs").write_text("version https://git-lfs")
    Path("cut").write_bytes(b"PK\3\4")
    Path("empty").write_text("")
    Path("row").write_text(CELEBA_CSV[:-9])
    Path("value").write_text(CELEBA_CSV.replace("-1", "2"))
    Path("rows").write_text(CELEBA_TXT.partition("000010")[0])
    prepare()
    before = stamps()
    assert words in prepare_error(command, capsys)
    assert stamps() == before

def read_faces(folder):
    return np.array([np.array(Image.open(p), int) for p in sorted(Path(folder).glob("*.png"))])

def test_toy_faces_are_people_with_either_hair(celeba):
    prepare("--toy 6 --test 8")
    folders = ["black", "blond", "black_test", "blond_test"]
    black, blond, dark, fair = [read_faces(f"files/toy/{folder}") for folder in folders]
    assert len(black) == len(blond) == 6 and dark.shape == fair.shape == (8, 64, 64, 3)
    people = {face.tobytes() for face in np.concatenate([black, blond, dark])}
    assert len(people) == 20
    hair = (dark != fair).any(-1).mean((1, 2))      # its share of each image
    assert 0.03 < hair.min() and hair.max() < 0.5
    assert ((fair - dark).mean((1, 2, 3)) > 50 * hair).all()

def test_toy_faces_stay_unless_seed_or_size_differ(celeba, capsys):
    prepare("--toy 3 --test 1")
    before, faces = stamps(), read_faces("files/toy/blond")
    capsys.readouterr()
    prepare("--toy 2 --test 1")                     # the third is still there, and counted
    assert stamps() == before
    assert "blond: 3 images" in capsys.readouterr().out
    for seed, size in ((1, 64), (1, 6), (0, 64)):
        prepare_celeba.toy_faces("files/toy", 3, n_test=1, size=size, seed=seed)
        new = read_faces("files/toy/blond")
        assert new.shape == (3, size, size, 3)
        assert np.array_equal(new, faces) == (seed == 0)

def test_the_published_faces_do_not_change():
    faces = []
    for i in range(20):
        rng = np.random.default_rng(i)
        faces.append(np.array(prepare_celeba.draw_face(rng, i % 2 == 1)))
    assert zlib.crc32(np.array(faces).tobytes()) == 3241511502      # Pillow 11.0 and 13.0 agree

def test_toy_faces_never_overwrite_an_image_that_is_not_theirs(celeba, capsys):
    photo = Path("files/toy/blond_test/00001.png")
    photo.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(photo)
    before = photo.read_bytes()
    assert str(photo) in prepare_error("--toy 2 --test 2", capsys)
    assert photo.read_bytes() == before
    assert list(Path("files/toy").rglob("*.png")) == [photo]

@pytest.mark.parametrize("terminal, end, first", [
    (True, "\r", "1 of 2,000"), (False, "\n", "3 of 2,000")])
def test_progress_is_live_on_a_terminal_and_a_line_now_and_then_elsewhere(
        monkeypatch, capsys, terminal, end, first):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(time, "monotonic", itertools.count(0, 4).__next__)
    items = list(prepare_celeba.progress(range(2000)))
    printed = capsys.readouterr().out.split(end)
    assert len(items) == 2000 and len(printed) > 200
    assert printed[0] == first

def test_a_name_that_the_console_cannot_print(celeba, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    prepare("--out M\u00fcller --toy 1 --test 0")
    console.flush()
    assert b"M?ller" in console.buffer.getvalue()

@pytest.mark.skipif(not CELEBA.exists(), reason="no real CelebA in ../shared/data/celeba")
def test_the_real_list_and_images_give_the_known_counts(tmp_path, capsys):
    images = CELEBA / "img_align_celeba_half.zip"
    attributes = CELEBA / "list_attr_celeba.txt.zip"
    prepare(f"--images {images} --attributes {attributes} --out {tmp_path}")
    printed = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["202,599", "48,472", "29,980", "3", "124,147", "74,569",
                       "2,432 images", "1,451 images"]
    assert len(os.listdir(tmp_path / "black")) == 2432
    assert Image.open(min(tmp_path.glob("blond/*"))).size == (89, 109)

# ---- The documents -------------------------------------------------------------------------------
README = (ROOT / "README.md").read_text()
FENCE = r"(?ms)^ *```(\w*)\n(.*?)^ *```"
BLOCKS = re.findall(FENCE, README)

def test_the_readme_explains_every_flag(capsys):
    for name in re.findall(r"^  (--\w+)", help_text(capsys), re.M):
        assert re.search(rf"{name}\b", README), name

def test_the_readme_has_no_dead_links():
    text = re.sub(FENCE, "", README)
    titles = re.findall("^#+ (.*)", text, re.M)
    anchors = ["#" + re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
    for target in re.findall(r"\]\((?!https?:)([^)]+)", text):
        assert target in anchors or (ROOT / target).exists(), target

def test_the_readme_lists_the_sections_of_the_file():
    source = (ROOT / "cyclegan.py").read_text()
    sections = re.findall(r"^# ---- (\d+)\. (.+?) -+$", source, re.M)
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", README, re.M)
    assert len(sections) == 11
    assert [row for row in rows if row in sections] == sections

# What to append to a command to make it small: the first of these words that it has decides.
SMALLER = {
    "--bench": f"--rounds 1 {SMALL}",
    "--demo": f"--max_steps 2 {SMALL}",
    "--dataA": f"--max_steps 2 {SMALL} --batch_size 2",
    "--resume": "--max_steps 3",
    "--checkpoint": "--overwrite --device cpu",
    "--test": "--test 1"}
NOT_RUN = "git pip cd source pytest fidelity export tensorboard".split()
# What the commands that need processes of their own become here.
HERE = {"torchrun": "python -m torch.distributed.run", "python ": f"{sys.executable} ",
        "=8": "=2", "nnodes=2": "nnodes=1", "HOST:29500": "localhost:0",
        " cyclegan.py": f" {ROOT}/cyclegan.py", " test_cyclegan.py": f" {ROOT}/test_cyclegan.py"}
# Folders of images that the reader of the documents has.
FOLDERS = ("files/img_align_celeba photos mnist svhn horse2zebra/trainA horse2zebra/trainB "
           "monet2photo/trainA monet2photo/trainB cezanne2photo/trainA").split()
ATTRIBUTES = """7
Black_Hair Blond_Hair Eyeglasses Male
000.png  1 -1  1  1
001.png  1 -1 -1 -1
002.png  1 -1 -1  1
003.png  1 -1 -1 -1
004.png -1  1  1  1
005.png -1  1 -1 -1
006.png -1  1 -1 -1
"""

def shell_commands(script):
    """-> the commands in a shell script, as lists of words, with its variables replaced."""
    commands, variables = [], {}
    for line in script.replace("\\\n", "").splitlines():
        line = string.Template(line).safe_substitute(variables)
        words = shlex.split(line, comments=True)
        if words and re.match(r"[A-Z]+=", words[0]):
            name, _, variables[name] = words[0].partition("=")
        elif words and words[0] not in NOT_RUN and words not in commands:
            commands.append(words)
    return commands

def run_command(program, script, *words):
    """Runs a command of the documents, in this process if possible -> exit status."""
    if program == "python" and script == "cyclegan.py":
        return cyclegan.main(list(words))
    if program == "python" and script == "prepare_celeba.py":
        return prepare_celeba.main(list(words))
    command = shlex.join([program, script, *words])
    for word, replacement in HERE.items():
        command = command.replace(word, replacement)
    return os.system(command)

def test_every_command_and_program_in_the_documents_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_faces = prepare_celeba.toy_faces
    monkeypatch.setattr(
        prepare_celeba, "toy_faces", lambda folder, *_, **__: toy_faces(folder, 3, 2))
    for folder in FOLDERS:
        write_images(folder, 7)
    Path("files/list_attr_celeba.txt").write_text(ATTRIBUTES)
    torch.save(textbook_resnet(flags("--ngf 2 --blocks 1")).state_dict(), "latest_net_G_A.pth")
    docstrings = "\n".join([prepare_celeba.__doc__, cyclegan.__doc__, __doc__])
    script = re.findall(r"^ *((?:python|torchrun) .*?)(?:  .*)?$", docstrings, re.M)
    script = [command for command in script if "DIR" not in command]
    script += [block for language, block in BLOCKS if language == ""]
    for command in shell_commands("\n".join(script)):
        if "--dataA" in command and "--out_dir" not in command:
            shutil.rmtree("runs/black2blond", ignore_errors=True)
        smaller = [words for flag, words in SMALLER.items() if flag in command]
        assert not run_command(*command, *" ".join(smaller[:1]).split()), command
    monkeypatch.setitem(sys.modules, "matplotlib", mock.Mock())     # not a package of the tests
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", mock.Mock())
    for language, program in BLOCKS:
        if language == "python":
            exec(program.replace("1000", "2"), {"__name__": "readme"})

# ---- The proof against the official code ---------------------------------------------------------
# Official names: G_A is our G_AB, D_A judges B, and idt_A is what G_A makes of B.
OFFICIAL_NAMES = {"G_A": "adv_AB", "G_B": "adv_BA", "cycle_A": "cycle_A", "cycle_B": "cycle_B",
                  "idt_A": "idt_B", "idt_B": "idt_A", "D_A": "D_B", "D_B": "D_A"}
exceeded = []

def report(what, value, allowed):
    """Prints a row, and remembers it if the value exceeds what rounding allows."""
    print(f"  {what:36}{value:10.1e}   (allowed: {allowed:.0e})", flush=True)
    if not value <= allowed:
        exceeded.append(what)

def official_model(netG, ngf, is_train):
    """-> the official CycleGANModel with the options of plain CycleGAN."""
    opt = argparse.Namespace(
        input_nc=3, output_nc=3, ngf=ngf, ndf=ngf, netG=netG, netD="basic", n_layers_D=3,
        norm="instance", normG="instance", normD="instance", init_type="normal", init_gain=0.02,
        no_dropout=True, no_antialias=True, no_antialias_up=True, lambda_A=10.0, lambda_B=10.0,
        lambda_identity=0.5, gan_mode="lsgan", pool_size=0, lr=2e-4, beta1=0.5, direction="AtoB",
        isTrain=is_train, gpu_ids=[], device=torch.device("cpu"), amp=False, preprocess="none",
        checkpoints_dir="", name="")
    with contextlib.redirect_stdout(sys.stderr):        # it reports each network
        return importlib.import_module("models.cycle_gan_model").CycleGANModel(opt)

def compare_training():
    print("\n1. Training in float64: resnet_6blocks and PatchGAN with 8 channels, 64 pixels, batch"
          "\n1, lsgan, identity 0.5, no pool. The largest relative difference of the 8 losses:\n")
    torch.set_default_dtype(torch.float64)
    official = official_model("resnet_6blocks", 8, is_train=True)
    model, *rest = make_trainer("--size 64 --ngf 8 --ndf 8 --pool_size 0 --device cpu --amp off")
    networks = [official.netG_A, official.netG_B, official.netD_B, official.netD_A]
    copy_weights(nn.ModuleList(networks), model)
    for step in range(1, 21):
        real_A, real_B = random_images(1, 64, seed=step)
        official.set_input({"A": real_A, "B": real_B, "A_paths": "", "B_paths": ""})
        official.optimize_parameters()
        terms = cyclegan.train_step(model, *rest, real_A, real_B, step)
        differences = []
        for name, loss in official.get_current_losses().items():
            differences.append(abs(terms[OFFICIAL_NAMES[name]].item() / loss - 1))
        report(f"step {step}", max(differences), 1e-10 if step == 1 else 1e-5)
    difference = distance([model.G_AB(real_A)], [official.netG_A(real_A)])
    report("translation after step 20", difference, 1e-5)
    torch.set_default_dtype(torch.float32)

def compare_checkpoints(folder):
    print("\n2. Official generators, saved there and loaded here as by --checkpoint, in float32."
          "\nThe relative difference of the translations of a random image:\n")
    for netG, size in [("resnet_9blocks", 256), ("resnet_6blocks", 128),
                       ("unet_256", 256), ("unet_128", 128)]:
        G = official_model(netG, 64, is_train=False).netG_A
        torch.save(G.state_dict(), f"{folder}/latest_net_G_A.pth")
        generators, _ = cyclegan.load_generators(f"{folder}/latest_net_G_A.pth")
        image, _ = random_images(1, size, torch.float32)
        with torch.no_grad():
            report(netG, distance([generators["AtoB"](image)], [G(image)]), 1e-4)

def compare_inputs(folder):
    print("\n3. JPEG files, resized to 256x256: the mean difference of the networks' inputs, in"
          "\nunits of 1/255. For training, cyclegan.py decodes large files at 1/2, 1/4 or 1/8 of"
          "\ntheir size before it resizes them by the same filter: faster, but not identical.\n")
    transform = importlib.import_module("data.base_dataset").get_transform(argparse.Namespace(
        preprocess="resize_and_crop", load_size=256, crop_size=256, no_flip=True, dataroot=""))
    path = f"{folder}/image.jpg"
    colors = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    for size in [(61, 97), (178, 218), (256, 256), (500, 333), (1024, 768), (3000, 2000)]:
        Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC).save(path)
        theirs = 127.5 * (transform(Image.open(path)) + 1)
        for purpose, min_side in [("translating", None), ("training", 256)]:
            ours = cyclegan.preprocess(cyclegan.read_image(path, min_side), flags())
            is_reduced = min_side and min(size) >= 2 * min_side
            allowed = 2 if is_reduced else 1e-4
            report(f"{size}, for {purpose}", (ours - theirs).abs().mean(), allowed)

def compare_with_official(folder):
    """Prints how far cyclegan.py is from the official code. Returns 1 if further than allowed."""
    sys.modules["apex"] = types.SimpleNamespace(amp=None)       # imported, but not used
    sys.path.insert(0, os.path.abspath(folder))
    torch.set_num_threads(1)
    print(f"cyclegan.py and the official code in {folder}, from the same weights and images;\n"
          f"torch {torch.__version__}, CPU")
    with tempfile.TemporaryDirectory() as temporary:
        compare_training()
        compare_checkpoints(temporary)
        compare_inputs(temporary)
    print(f"\n{len(exceeded)} differences are larger than allowed", *exceeded, sep="\n  ")
    return int(len(exceeded) > 0)

# ---- The benchmark -------------------------------------------------------------------------------
TEXTBOOK = "textbook step, eager, float32"
SHIPPED = "cyclegan.py, the program as shipped"

def bench_cases(runtime):
    """-> {line of the table: flags of cyclegan.py}."""
    if runtime.is_cuda:                 # where runs of 2,000 steps and more are compiled
        return {TEXTBOOK: "", SHIPPED: "--compile on", "  --compile off": "--compile off",
                "  --amp off": "--compile on --amp off",
                "  --compile off --amp off": "--compile off --amp off"}
    if runtime.precision == "off":      # already as shipped
        return {TEXTBOOK: "", SHIPPED: ""}
    return {TEXTBOOK: "", SHIPPED: "", "  --amp off": "--amp off"}

def make_stepper(case, words):
    """-> a function that takes a training step."""
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
    """Times all cases interleaved in one process, about a second each per round; prints a table."""
    args = flags(words)
    runtime = cyclegan.Runtime(args)
    torch._dynamo.reset()               # a network is compiled for only a few batch sizes
    steppers, n_steps = {}, {}
    memory, seconds = {}, {}
    for case, options in bench_cases(runtime).items():
        bytes_before = torch.cuda.memory_allocated()
        steppers[case] = make_stepper(case, f"{words} {options}")
        seconds_per_step(steppers[case], 2)         # compiles; cuDNN tries its algorithms
        if runtime.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        n_steps[case] = math.ceil(1 / seconds_per_step(steppers[case], 1))
        gib = (torch.cuda.max_memory_allocated() - bytes_before) / 2**30
        memory[case] = f"{gib:.1f}" if runtime.is_cuda else "-"
        seconds[case] = []
    for _ in range(rounds):
        for case, take_step in steppers.items():
            seconds[case].append(seconds_per_step(take_step, n_steps[case]))
    with FlopCounterMode(display=False) as counter:
        steppers[TEXTBOOK]()
    tflop = counter.get_total_flops() / 1e12

    device = torch.cuda.get_device_name() if runtime.is_cuda else "CPU"
    print(f"\n{device}, torch {torch.__version__}, flags:{words}\n"
          f"precision {runtime.precision}; {tflop:.2f} TFLOP per step; n = {rounds} rounds\n\n"
          f"{'':37}ms/step, median (min to max)   images/s  TFLOP/s   GiB   speed")
    for case, times in seconds.items():
        median = statistics.median(times)
        ratios = [book / ours for book, ours in zip(seconds[TEXTBOOK], times)]
        spread = f"({1000 * min(times):.1f} to {1000 * max(times):.1f})"
        print(f"{case:37}{1000 * median:8.1f} {spread:21}{2 * args.batch_size / median:9.3g}"
              f"{tflop / median:9.3g}{memory[case]:>6}{statistics.median(ratios):7.2f}x")
    ratios = [book / ours for book, ours in zip(seconds[TEXTBOOK], seconds[SHIPPED])]
    print(f"ratio: the program as shipped is {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
          f"{max(ratios):.2f}) times as fast as the textbook step", flush=True)

def measure_gpu(folder):
    """Writes into a folder what only a GPU can tell: tests, a profile of a step, benchmark."""
    if not torch.cuda.is_available():
        print("test_cyclegan.py: --gpu needs a CUDA device; none is available", file=sys.stderr)
        return 2
    os.makedirs(folder, exist_ok=True)
    def write_output(name, words):
        with open(f"{folder}/{name}", "w") as file:
            subprocess.run([sys.executable, *words.split()], stdout=file, stderr=file)
    write_output("tests.txt", f"-m pytest -v -k cuda {__file__}")
    take_step = make_stepper(SHIPPED, "--compile on")
    seconds_per_step(take_step, 3)
    with torch.profiler.profile() as profile:
        seconds_per_step(take_step, 1)
    table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=10)
    Path(folder, "profile.txt").write_text(table)
    write_output("faces.txt", f"{ROOT}/prepare_celeba.py --toy 100 --out {folder}")
    # The column `waiting` is the share of time in which the GPU waits for data.
    write_output("run.txt", "-m torch.distributed.run --standalone --nproc_per_node=1 "
                 f"{ROOT}/cyclegan.py --dataA {folder}/toy/black --dataB {folder}/toy/blond "
                 f"--out_dir {folder}/run --device cuda:0 --compile on --max_steps 500")
    write_output("bench.txt", f"{__file__} --bench --rounds 5")
    return 0

def main():
    """Runs the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--official")
    parser.add_argument("--gpu")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    args, rest = parser.parse_known_args()
    if args.official:
        return compare_with_official(args.official)
    if args.gpu:
        return measure_gpu(args.gpu)
    if not args.bench:
        print(__doc__)
        return 2
    words = " ".join(["", *rest])
    if "--batch_size" in words or not cyclegan.Runtime(flags(words)).is_cuda:
        bench(words, args.rounds)
        return 0
    for batch_size in (1, 4, 16):
        bench(f"{words} --batch_size {batch_size}", args.rounds)
    return 0

if __name__ == "__main__":
    sys.exit(main())
