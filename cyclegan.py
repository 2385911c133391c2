#!/usr/bin/env python3
"""
CycleGAN in one file: learns to translate between two kinds of images from two unpaired folders.
Zhu, Park, Isola, Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
Networks", ICCV 2017, arXiv:1703.10593. In the code, § and Eq. refer to this paper.

  python cyclegan.py --demo                                     # toy faces; minutes on a CPU
  python cyclegan.py --dataA files/black --dataB files/blond    # train; writes runs/black2blond
  python cyclegan.py --resume runs/black2blond                  # continue from the last checkpoint
  python cyclegan.py --checkpoint runs/black2blond/generators.pt --input photos --output out
  torchrun --standalone --nproc_per_node=8 cyclegan.py --dataA files/black --dataB files/blond

Two generators translate, one in each direction; two discriminators learn to tell real images from
translated ones. No image comes with its translation. Cycle consistency takes the place of pairs:
an image that is translated and translated back should come back unchanged.

  real_A ──G_AB──> fake_B ──G_BA──> rec_A ≈ real_A      in the paper: x, G(x), F(G(x))
                     └──> D_B: real or fake?                                └──> D_Y
  real_B ──G_BA──> fake_A ──G_AB──> rec_B ≈ real_B      in the paper: y, F(y), G(F(y))
                     └──> D_A: real or fake?                                └──> D_X

Where to make changes
  a new generator, a new GAN loss        a class or function, and a line in GENERATORS or GAN_LOSSES
  a new term of the objective            CycleGAN.generator_loss; the log gets a column for it
  a frozen network, such as VGG          CycleGAN.__init__; not in CycleGAN.networks
  gradient accumulation or penalty       train_step (a penalty needs --no-compile)
  an average of the generators           train: put the copies in `generators` and `parts`
  augmentation, schedule, logging        preprocess, lr_at, write_log
"""
import argparse
import contextlib
import csv
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision import transforms as T
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import sigmoid_focal_loss
from torchvision.transforms import functional as TF
from torchvision.utils import save_image

def die(message):
    """Ends the program with one line on stderr and exit status 2."""
    print(f"cyclegan.py: {message}", file=sys.stderr)
    if dist.is_initialized():
        os._exit(2)                     # a normal exit could hang, waiting for other processes
    sys.exit(2)

# ---- 1. Flags ------------------------------------------------------------------------------------
def get_args(argv=None, stored=None):
    """-> Namespace of all flags: defaults, overridden by those of a checkpoint, then by argv."""
    parser = argparse.ArgumentParser(
        usage="python cyclegan.py [flags]", description=__doc__.partition("\nTwo generators")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = die

    def path(text):                             # absolute: a run can be resumed from anywhere
        return os.path.abspath(os.path.expanduser(text))

    def add(name, default, help, **options):    # adds a flag to the current `group`
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):         # choices; the first is the default
            options["choices"] = default
            default = default[0]
        else:
            options["type"] = path if default is None else type(default)    # None: a path
        if default is not None:
            help += f" (default: {default})"
        group.add_argument(f"--{name}", default=default, help=help, **options)

    group = parser.add_argument_group("run")
    add("mode", ["train", "translate"], "translate is implied by --checkpoint")
    add("demo", False, "train on synthetic toy faces, print the error on unseen ones")
    add("out_dir", None, "folder of the run (default: runs/<A>2<B>)")
    add("resume", None, "folder of a run to continue; needs no other flag")
    add("seed", 0, "seed for weights, order of data, augmentation and pools")
    add("device", "auto", "cuda, cuda:1, mps or cpu; auto: a GPU if there is one")
    group = parser.add_argument_group("data")
    add("dataA", None, "folders of A images, searched recursively", nargs="+")
    add("dataB", None, "folders of B images; the counts may differ", nargs="+")
    add("size", 256, "side of the training images, in pixels")
    add("load_size", 0, "resize to this (0: 1.12 x size), then crop at random to size")
    add("resize", ["stretch", "crop"], "stretch ignores the aspect ratio; crop keeps it")
    add("flip", True, "mirror half of the images")
    add("workers", 4 if torch.cuda.is_available() else 0, "processes that load images")
    group = parser.add_argument_group("networks")
    add("generator", list(GENERATORS), "ResNet (the paper's) or U-Net")
    add("blocks", 0, "residual blocks; 0 means 9 if size >= 256, else 6")
    add("ngf", 64, "channels of a generator's first layer")
    add("ndf", 64, "channels of a discriminator's first layer")
    add("upsample", ["deconv", "nearest"], "nearest avoids checkerboard artifacts")
    group = parser.add_argument_group("objective")
    add("gan_loss", list(GAN_LOSSES), "least squares (the paper's), cross-entropy, focal or GHM")
    add("lambda_cycle", 10.0, "weight of cycle consistency")
    add("lambda_identity", 0.5, "weight of the identity term, relative to lambda_cycle")
    add("pool_size", 50, "past fakes kept to train each discriminator; 0: none")
    group = parser.add_argument_group("schedule")
    add("epochs", 100, "passes over the larger folder at a constant learning rate")
    add("epochs_decay", 100, "further epochs, in which the learning rate decays to 0")
    add("max_steps", 10**9, "stop at this step, whatever the schedule")
    add("batch_size", 1, "images of each domain per step and process")
    add("lr", 2e-4, "learning rate of Adam")
    add("beta1", 0.5, "first beta of Adam")
    group = parser.add_argument_group("speed")
    add("amp", ["auto", "bf16", "off"], "mixed precision; auto: bf16 if the hardware has it")
    add("compile", torch.cuda.is_available(), "torch.compile; on by default only with CUDA")
    group = parser.add_argument_group("output")
    add("log_every", 100, "steps between rows of the log")
    add("sample_every", 500, "steps between sample grids")
    add("save_every", 2000, "steps between checkpoints")
    group = parser.add_argument_group("translate")
    add("checkpoint", None, "generators.pt, or a generator from other CycleGAN code")
    add("input", None, "images, and folders of images", nargs="+")
    add("output", None, "output folder; PNGs keep the names and structure of the input")
    add("overwrite", False, "allow an existing --output, and replace its files")
    add("direction", ["AtoB", "BtoA"], "which generator to use")
    add("native", False, "translate at each image's own size instead of --size")
    add("round_trip", False, "also write NAME_back.png, translated there and back")
    add("truth", None, "folders of true images with the same names: print the error", nargs="+")

    known = vars(parser.parse_args([])).keys()
    if stored is not None and stored.keys() != known:
        die(f"checkpoint of another version of cyclegan.py: {known ^ stored.keys()} differ")
    parser.set_defaults(**(stored or {}))
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        low = 0
        if name in ("ngf", "ndf", "batch_size", "log_every", "sample_every", "save_every"):
            low = 1
        if isinstance(value, (int, float)) and not value >= low:        # catches nan, too
            die(f"--{name} {value} must be at least {low}")
    args.load_size = args.load_size or args.size * 286 // 256
    args.blocks = args.blocks or (9 if args.size >= 256 else 6)
    return args

# ---- 2. Data -------------------------------------------------------------------------------------
# Two folders and no pairs: a step gets one image of A and an unrelated one of B. Images stay uint8
# until they are on the device, where they become floats in [-1, 1], the range of the tanh of G.
def find_images(tops):
    """Images and folders -> {path: name}. The name is relative to its folder, without suffix."""
    images = {}
    for top in map(Path, tops):
        if top.is_file():
            images[top] = Path(top.stem)
            continue
        files = [path.relative_to(top) for path in sorted(top.rglob("*")) if path.is_file()]
        files = [path for path in files if "/." not in f"/{path}"]      # not hidden
        found = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
        if not found:
            die(f"no images in {top}; is it the right place?")
        if len(found) < len(files):
            print(f"{top}: skipped {len(files) - len(found)} files of other types")
        images |= {top / path: path.with_suffix("") for path in found}
    return images

def read_image(path):
    """-> PIL RGB, EXIF-rotated; None, after a message, if the file is unreadable."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith(("I", "F")):       # 16 bits or more: of unknown range
            raise ValueError("convert it to 8 bits per channel")
        return image.convert("RGB")
    except Exception as error:          # decoders raise anything on broken files
        print(f"skipped {path}: {error}", file=sys.stderr)
        return None

def preprocess(image, args, augment=False):
    """PIL RGB of any size -> (3, size, size) uint8, with --native (3, H, W). Augmentation crops and
    mirrors at random."""
    if args.native and not augment:
        return TF.pil_to_tensor(image)
    side = args.load_size if augment else args.size
    new_size = side if args.resize == "crop" else (side, side)      # an int: the shorter side
    image = TF.resize(image, new_size, T.InterpolationMode.BICUBIC)
    crop = T.RandomCrop if augment else T.CenterCrop
    image = crop(args.size)(image)
    if augment and args.flip:
        image = T.RandomHorizontalFlip()(image)
    return TF.pil_to_tensor(image)

def seed_torch(*key):
    """Seeds torch: the same key, such as (seed, step, rank), gives the same random numbers."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))

class UnpairedImages(torch.utils.data.Dataset):
    """Item n of an endless stream: an image of A and one of B, (3, size, size) uint8. Items are
    pure functions of (seed, n): a resumed run sees the same images, with any number of workers."""
    def __init__(self, args):
        if None in (args.dataA, args.dataB):
            die("training needs --dataA and --dataB; see --help, or try --demo")
        if set(args.dataA) & set(args.dataB):
            die("the same folder is in --dataA and in --dataB")
        self.args = args
        self.paths_A, self.paths_B = list(find_images(args.dataA)), list(find_images(args.dataB))

    def __getitem__(self, n):
        return self.load_item(self.paths_A, n, "A"), self.load_item(self.paths_B, n, "B")

    def load_item(self, paths, n, domain):
        lap, i = divmod(n, len(paths))          # a lap shows each image of the domain once
        rng = np.random.default_rng((self.args.seed, lap, ord(domain)))
        order = rng.permutation(len(paths))
        seed_torch(self.args.seed, n, domain)
        for k in np.roll(order, -i)[:100]:      # image i, or the next one that can be read
            image = read_image(paths[k])
            if image is not None:
                return preprocess(image, self.args, augment=True)
        die(f"too many unreadable images near {paths[k]}")

def ignore_signals(_):
    """For loader processes: the main process decides when to stop and needs data until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def load_batches(data, steps, runtime):
    """Yields real_A, real_B for a range of steps: (N, 3, size, size) in [-1, 1], on the device."""
    args = data.args
    pairs_per_step = args.batch_size * runtime.world_size
    # Steps count from 1, pairs from 0; each process takes every world_size-th pair.
    pairs = range((steps.start - 1) * pairs_per_step, (steps.stop - 1) * pairs_per_step)
    loader = torch.utils.data.DataLoader(
        data, args.batch_size, sampler=pairs[runtime.rank::runtime.world_size],
        num_workers=args.workers, worker_init_fn=ignore_signals, pin_memory=runtime.is_cuda)
    for real_A, real_B in loader:
        yield runtime.to_float(real_A), runtime.to_float(real_B)

# ---- 3. Generators -------------------------------------------------------------------------------
# Image in, image out: (N, 3, H, W) in [-1, 1], fully convolutional. Three choices of the paper:
# reflection padding at full size and in the blocks, because a border of zeros would show; instance
# norm, because each image has its own contrast; tanh, for the range of the images.
class InstanceNorm(nn.Module):
    """Each channel of an image to mean 0, variance 1: (N, C, H, W) -> same. A group norm, because
    nn.InstanceNorm2d has wrong gradients on a CPU for N = 1 in the channels_last memory format."""
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):      # autocast would upcast it
            return F.group_norm(x, num_groups=x.shape[1])

def upsample(n_in, n_out, args, kernel_size=3):
    """(N, n_in, H, W) -> (N, n_out, 2H, 2W). The paper has transposed convolutions (§7.2);
    resizing before a convolution avoids their checkerboard artifacts (Odena et al. 2016)."""
    if args.upsample == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(n_in, n_out, 3, padding=1))
    output_padding = kernel_size % 2    # so that the size doubles exactly
    return nn.ConvTranspose2d(n_in, n_out, kernel_size, 2, 1, output_padding)

class Sequential(nn.Sequential):
    """Has a forward of its own, because torch 2.11 does not compile that of nn.Sequential."""
    def forward(self, x):
        return super().forward(x)

class ResidualBlock(nn.Sequential):
    """x + f(x), (N, n, H, W) -> same: a block only has to learn a change."""
    def __init__(self, n):
        super().__init__(
            nn.Conv2d(n, n, 3, padding=1, padding_mode="reflect"), InstanceNorm(), nn.ReLU(),
            nn.Conv2d(n, n, 3, padding=1, padding_mode="reflect"), InstanceNorm())

    def forward(self, x):
        return x + super().forward(x)

class ResNetGenerator(Sequential):
    """The paper's generator (§7.2): 11,378,179 parameters with 9 blocks, 7,837,699 with 6."""
    size_multiple = 4                           # what H and W must be divisible by

    def __init__(self, args):
        n = args.ngf
        norm_relu = [InstanceNorm(), nn.ReLU()]         # no weights: all layers can share them
        super().__init__(                                                       # (N,   3, H,   W)
            nn.Conv2d(3, n, 7, padding=3, padding_mode="reflect"), *norm_relu,  # (N,  64, H,   W)
            nn.Conv2d(n, 2 * n, 3, stride=2, padding=1), *norm_relu,            # (N, 128, H/2, W/2)
            nn.Conv2d(2 * n, 4 * n, 3, stride=2, padding=1), *norm_relu,        # (N, 256, H/4, W/4)
            *[ResidualBlock(4 * n) for _ in range(args.blocks)],                # (N, 256, H/4, W/4)
            upsample(4 * n, 2 * n, args), *norm_relu,                           # (N, 128, H/2, W/2)
            upsample(2 * n, n, args), *norm_relu,                               # (N,  64, H,   W)
            nn.Conv2d(n, 3, 7, padding=3, padding_mode="reflect"), nn.Tanh())   # (N,   3, H,   W)

class UNetGenerator(nn.Module):
    """The U-Net of pix2pix, 54,409,603 parameters at 256 pixels. Each level is a UNetGenerator: it
    halves the resolution, runs the level inside, doubles it and (level > 1) appends its input."""
    size_multiple = 32                              # checks --size; __init__ sets 2**levels

    def __init__(self, args, level=1, n_in=3):
        super().__init__()
        levels = max(k for k in range(9) if args.size % 2**k == 0)      # 256 -> 8, 96 -> 5
        n = args.ngf * min(2 ** (level - 1), 8)
        self.size_multiple = 2**levels
        self.is_outermost = level == 1
        self.down = nn.Conv2d(n_in, n, 4, stride=2, padding=1)
        self.inside = UNetGenerator(args, level + 1, n) if level < levels else None
        n_up = n if self.inside is None else 2 * n
        self.up = upsample(n_up, n_in, args, kernel_size=4)
        self.norm = InstanceNorm()

    def forward(self, x):                           # (N, n_in, H,   W)
        if self.is_outermost:
            y = self.inside(self.down(x))           # (N, 2n,   H/2, W/2)
            return self.up(y.relu()).tanh()         # (N, 3,    H,   W)
        y = self.down(F.leaky_relu(x, 0.2))         # (N, n,    H/2, W/2)
        if self.inside is not None:                 # innermost no norm: it zeroes 1x1 maps
            y = self.inside(self.norm(y))           # (N, 2n,   H/2, W/2)
        y = self.norm(self.up(y.relu()))            # (N, n_in, H,   W)
        return torch.cat([x, y], dim=1)             # (N, 2n_in, H,  W)

GENERATORS = {"resnet": ResNetGenerator, "unet": UNetGenerator}

# ---- 4. Discriminator ----------------------------------------------------------------------------
# A score for each 70x70 patch instead of one for the image (§4): texture and color can be judged
# locally, and the cycle preserves the layout. Receptive field of a score, from the last layer back:
# side -> (side - 1) * stride + 4, that is 1, 4, 7, 16, 34, 70.
class PatchDiscriminator(Sequential):
    """The 70x70 PatchGAN (§7.2), 2,764,737 parameters. Raw scores; a sigmoid is up to the loss."""
    def __init__(self, args):
        n = args.ndf
        norm_act = [InstanceNorm(), nn.LeakyReLU(0.2)]
        super().__init__(                                                # (N,   3, H,     W)
            nn.Conv2d(3, n, 4, stride=2, padding=1), nn.LeakyReLU(0.2),  # (N,  64, H/2,   W/2)
            nn.Conv2d(n, 2 * n, 4, stride=2, padding=1), *norm_act,      # (N, 128, H/4,   W/4)
            nn.Conv2d(2 * n, 4 * n, 4, stride=2, padding=1), *norm_act,  # (N, 256, H/8,   W/8)
            nn.Conv2d(4 * n, 8 * n, 4, stride=1, padding=1), *norm_act,  # (N, 512, H/8-1, W/8-1)
            nn.Conv2d(8 * n, 1, 4, stride=1, padding=1))                 # (N,   1, H/8-2, W/8-2)

def init_weights(module):
    """N(0, 0.02) for the kernel of a convolution (§7.1), 0 for its bias."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        for parameter in module.parameters():       # a bias, ndim 1, gets std 0: zeros
            nn.init.normal_(parameter, 0.0, 0.02 if parameter.ndim == 4 else 0.0)

# ---- 5. Image pool -------------------------------------------------------------------------------
# A discriminator that sees only the newest fakes forgets old ones; the generators bring them back,
# and training oscillates. Hence half of the fakes it sees are older (§4, Shrivastava et al. 2017).
class ImagePool:
    """Up to `size` earlier fakes of one domain; size 0 is off."""
    def __init__(self, size):
        self.size = size
        self.images = []

    def query(self, fakes):
        """(N, 3, H, W), detached -> same. Once full, swaps each with probability 1/2."""
        result = []
        for fake in fakes:
            if len(self.images) < self.size:
                self.images.append(fake.clone())
            elif self.size > 0 and torch.rand(()) < 0.5:
                k = int(torch.randint(self.size, ()))
                fake, self.images[k] = self.images[k].to(fake), fake.clone()
            result.append(fake)
        return torch.stack(result)

    def state_dict(self):
        return {"images": self.images}

    def load_state_dict(self, state):
        self.images = state["images"]

# ---- 6. Objective --------------------------------------------------------------------------------
# Three terms for the generators. Adversarial (Eq. 1): the output looks like the other domain, but
# alone it would allow one such image for all inputs (collapse). Cycle (Eq. 2): translating back
# recovers the input, but alone it would allow any reversible change, such as inverted colors.
# Identity (§5.2): G_AB should leave a real B as it is, or else it may shift colors without need.
# With a large weight, G copies any input. The paper uses this term for paintings, its code always.
#   In a healthy run with lsgan, the losses D_A and D_B are between 0.1 and 0.25 (0.25 is guessing),
# adv_AB and adv_BA between 0.3 and 0.6; the other losses fall for many epochs. If D_A and D_B are
# near 0, and adv_AB and adv_BA near 1, then D has won, or G copies its input.
def lsgan(scores, target):
    """Least squares (§4, Mao et al. 2017): unlike bce, it still pulls on a fake that fools D."""
    return F.mse_loss(scores, torch.full_like(scores, target))

def bce(scores, target):
    """Cross-entropy on logits: Eq. 1, with the non-saturating loss for G."""
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))

def focal(scores, target):
    """Lin et al. 2017, Eq. 4: cross-entropy times (1 - p)^2, p the probability of the target."""
    return sigmoid_focal_loss(scores, torch.full_like(scores, target), alpha=-1, reduction="mean")

def ghm(scores, target, n_bins=10):
    """GHM-C, Li et al. 2019, Eq. 7: cross-entropy averaged within bins of similar gradient
    |p - target|, then over the bins, so that a crowd of easy patches counts as one bin."""
    targets = torch.full_like(scores, target)
    entropy = F.binary_cross_entropy_with_logits(scores, targets, reduction="none").flatten()
    gradient = (scores.detach().sigmoid() - target).abs().flatten()
    bins = (gradient * n_bins).long().clamp(max=n_bins - 1)
    n_in_bin = F.one_hot(bins, n_bins).sum(0)       # unlike bincount, does not wait for the GPU
    return (entropy / n_in_bin[bins]).sum() / n_in_bin.count_nonzero()

# name: (loss of D, loss of G). focal and ghm reweight the patches for D only.
GAN_LOSSES = {"lsgan": (lsgan, lsgan), "bce": (bce, bce), "focal": (focal, bce), "ghm": (ghm, bce)}

class CycleGAN(nn.Module):
    """Two generators, two discriminators, and what each pair minimizes."""
    def __init__(self, args):
        super().__init__()
        Generator = GENERATORS[args.generator]
        if args.size % Generator.size_multiple or not 32 <= args.size <= args.load_size:
            die(f"--size must be a multiple of {Generator.size_multiple} from 32 to --load_size")
        self.G_AB, self.G_BA = Generator(args), Generator(args)
        self.D_A, self.D_B = PatchDiscriminator(args), PatchDiscriminator(args)
        for network in self.networks().values():
            network.apply(init_weights)
            if args.compile:
                network.compile(dynamic=False)          # a graph per shape
        self.d_loss, self.g_loss = GAN_LOSSES[args.gan_loss]
        self.lambda_cycle = args.lambda_cycle
        self.lambda_identity = args.lambda_cycle * args.lambda_identity     # from here on absolute

    def networks(self):     # those that are initialized, compiled and saved
        return {"G_AB": self.G_AB, "G_BA": self.G_BA, "D_A": self.D_A, "D_B": self.D_B}

    def generator_loss(self, real_A, real_B):
        """Eq. 3 plus the identity term. Images: (N, 3, H, W) in [-1, 1].
        -> loss, its terms (name: weighted scalar), fake_A, fake_B (detached)."""
        if self.lambda_identity > 0:    # one pass for both: instance norm never mixes images
            fake_B, idt_B = self.G_AB(torch.cat([real_A, real_B])).chunk(2)
            fake_A, idt_A = self.G_BA(torch.cat([real_B, real_A])).chunk(2)
        else:
            fake_B = self.G_AB(real_A)
            fake_A = self.G_BA(real_B)
        rec_A = self.G_BA(fake_B)
        rec_B = self.G_AB(fake_A)
        terms = {"adv_AB": self.g_loss(self.D_B(fake_B), 1.0),
                 "adv_BA": self.g_loss(self.D_A(fake_A), 1.0),
                 "cycle_A": self.lambda_cycle * F.l1_loss(rec_A, real_A),
                 "cycle_B": self.lambda_cycle * F.l1_loss(rec_B, real_B)}
        if self.lambda_identity > 0:
            terms["idt_A"] = self.lambda_identity * F.l1_loss(idt_A, real_A)
            terms["idt_B"] = self.lambda_identity * F.l1_loss(idt_B, real_B)
        return sum(terms.values()), terms, fake_A.detach(), fake_B.detach()

    def discriminator_loss(self, real_A, real_B, fake_A, fake_B):
        """Real images should score 1, fakes 0. Halved to slow D down (§7.1), though Adam is nearly
        invariant to the scale of a loss. -> loss, terms (name: scalar)."""
        score_real_A, score_fake_A = self.D_A(torch.cat([real_A, fake_A])).chunk(2)
        score_real_B, score_fake_B = self.D_B(torch.cat([real_B, fake_B])).chunk(2)
        loss_A = 0.5 * (self.d_loss(score_real_A, 1.0) + self.d_loss(score_fake_A, 0.0))
        loss_B = 0.5 * (self.d_loss(score_real_B, 1.0) + self.d_loss(score_fake_B, 0.0))
        return loss_A + loss_B, {"D_A": loss_A, "D_B": loss_B}

# ---- 7. One step ---------------------------------------------------------------------------------
def train_step(model, optimizers, pools, runtime, real_A, real_B, step):
    """Updates the generators, then the discriminators. Images (N, 3, H, W) in [-1, 1] -> terms."""
    seed_torch(runtime.args.seed, step, runtime.rank)   # resumed, the pools draw as before
    model.D_A.requires_grad_(False)     # G's gradient passes through D, but D's own is not needed
    model.D_B.requires_grad_(False)
    with runtime.autocast():
        loss, terms_G, fake_A, fake_B = model.generator_loss(real_A, real_B)
    loss.backward()
    runtime.step(optimizers["G"])       # averages over processes, updates, frees the gradients

    model.D_A.requires_grad_(True)
    model.D_B.requires_grad_(True)
    fake_A = pools["A"].query(fake_A)   # detached: from here on no gradient reaches the generators
    fake_B = pools["B"].query(fake_B)
    with runtime.autocast():
        loss, terms_D = model.discriminator_loss(real_A, real_B, fake_A, fake_B)
    loss.backward()
    runtime.step(optimizers["D"])
    return {name: term.detach() for name, term in (terms_G | terms_D).items()}

# ---- 8. Runtime ----------------------------------------------------------------------------------
# Skip on first reading: device, precision and processes. Nothing here changes the mathematics.
class Runtime:
    """Where a step runs. torchrun starts `world_size` processes, each with a `rank` of its own.
    Gradients are averaged by hand: DistributedDataParallel expects one forward per backward."""
    def __init__(self, args):
        self.args = args
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        name = args.device
        if name == "auto":
            has_gpu = torch.accelerator.is_available()
            name = torch.accelerator.current_accelerator().type if has_gpu else "cpu"
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(name)
            torch.zeros(1, device=self.device).item()
        except Exception:               # each kind of device raises its own
            die(f"--device {name} is not available; try --device cpu")
        self.is_cuda = self.device.type == "cuda"
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True       # tries all algorithms once per size
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.is_cuda else "gloo")
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # absent: False
        if self.is_cuda:                # a T4 emulates bf16, slowly
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        use_bf16 = args.amp == "bf16" or (args.amp == "auto" and has_bf16)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=use_bf16)

    def to_float(self, images):
        """uint8 -> float in [-1, 1], on the device."""
        return images.to(self.device, non_blocking=True).float() / 127.5 - 1

    def step(self, optimizer):
        """Averages gradients over processes, updates the parameters, frees the gradients."""
        self.average_([p.grad for group in optimizer.param_groups for p in group["params"]])
        optimizer.step()
        optimizer.zero_grad()

    def average_(self, tensors):
        """Replaces tensors by their means over all processes, in one all-reduce."""
        if self.world_size > 1:
            flat = nn.utils.parameters_to_vector(tensors)       # works for any tensors
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat / self.world_size, tensors)

    def mean(self, numbers):
        """-> the mean of each number over all processes."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self.average_([tensor])
        return tensor.tolist()

# ---- 9. Outputs ----------------------------------------------------------------------------------
def write_file(path, write, content):
    """Writes a temporary file, then renames it: a crash or a full disk leaves the old file."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.part", "wb") as file:
            write(content, file)
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:       # torch.save raises the latter
        die(f"cannot write {path} ({error}); is the disk full?")

# (N, 3, H, W) in [-1, 1]; six images per row.
write_png = partial(save_image, format="png", nrow=6, normalize=True, value_range=(-1, 1))

def progress(start_time, done, total):
    """On a terminal, and after five steps, shows a live line with the time left."""
    if done >= 5 and sys.stdout.isatty():
        hours = (time.time() - start_time) / done * (total - done) / 3600
        print(f"{done}/{total}, {hours:.2f} hours left", end="\033[K\r", flush=True)

@torch.no_grad()
def save_samples(step, generators, runtime, data):
    """Writes a grid, a column per item. Rows: real A, fake B, rec A, real B, fake A, rec B. Rows 2
    and 5 are the translations; rows 3 and 6, translated back, should equal rows 1 and 4."""
    batch = torch.utils.data.default_collate([data[n] for n in range(6)])
    real_A, real_B = [runtime.to_float(images) for images in batch]
    G_AB, G_BA = [G.forward for G in generators.values()]       # .forward: not compiled
    with runtime.autocast():
        fake_B, fake_A = G_AB(real_A), G_BA(real_B)
        grid = [real_A, fake_B, G_BA(fake_B), real_B, fake_A, G_AB(fake_A)]
    write_file(f"{data.args.out_dir}/samples/step_{step:07}.png", write_png, torch.cat(grid))

def mean_terms(sums, start_time, runtime, images_per_step):
    """Sums of terms over steps -> their means over steps and processes, and images per second."""
    n_steps = sums.pop("steps")
    means = runtime.mean([float(total) / n_steps for total in sums.values()])
    speed = images_per_step * n_steps / (time.time() - start_time)
    return dict(zip(sums, means)) | {"img/s": speed}

def write_log(path, rows):
    """Writes log.csv and prints the last row. If the file is locked, it is written later."""
    names = dict.fromkeys(name for row in rows for name in row)     # an ordered set
    table = [names] + [[row.get(name) for name in names] for row in rows]
    try:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(table)
    except OSError as error:
        print(f"cannot write {path} ({error.strerror}); trying again with the next row")
    if len(rows) % 10 == 1:
        print(*[f"{name:>7}" for name in rows[-1]])
    step, *values = rows[-1].values()
    print(f"{step:7}", *[f"{value:7.3g}" for value in values], flush=True)

def save_checkpoint(args, generators, parts, pairs_seen, rows):
    """Writes latest.pt, from which --resume continues, then generators.pt, for translating."""
    weights = {name: G.state_dict() for name, G in generators.items()}
    states = {name: part.state_dict() for name, part in parts.items()}
    shared = {"flags": vars(args), "generators": weights}
    latest = {**shared, "parts": states, "pairs_seen": pairs_seen, "rows": rows}
    write_file(f"{args.out_dir}/latest.pt", torch.save, latest)
    write_file(f"{args.out_dir}/generators.pt", torch.save, shared)

def load_checkpoint(path):
    """-> the dict in a checkpoint, its tensors on the CPU."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:                   # torch.load raises anything on a broken file
        die(f"{path} is missing, truncated, or not a checkpoint")

# ---- 10. Train -----------------------------------------------------------------------------------
def lr_at(epoch, args):
    """The learning rate at a (fractional) epoch: constant, then linear to 0 (§7.1). It depends on
    the flags only, so --resume with more --epochs can raise it again."""
    return args.lr * min(1, 1 - (epoch - args.epochs) / max(args.epochs_decay, 1))

def make_optimizers(model, args):
    """-> Adam (§7.1) for the generators and for the discriminators."""
    G = [*model.G_AB.parameters(), *model.G_BA.parameters()]
    D = [*model.D_A.parameters(), *model.D_B.parameters()]
    n_trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert n_trainable == len(G) + len(D), "a trainable parameter has no optimizer; freeze it?"
    adam = partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, 0.999), fused=True)
    return {"G": adam(G), "D": adam(D)}

stop_signals = []       # received so far; train and translate check it

def request_stop(number, _):
    """Signal handler. A second Ctrl-C ends the program at once."""
    stop_signals.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.write(2, b"\nfinishing this step, then saving; press Ctrl-C again to stop without saving\n")

def train(args, checkpoint=None):
    """Trains from scratch or continues from a checkpoint; writes into args.out_dir."""
    runtime, data = Runtime(args), UnpairedImages(args)
    torch.manual_seed(args.seed)        # the same initial weights in every process
    model = CycleGAN(args).to(runtime.device)
    optimizers = make_optimizers(model, args)
    pools = {"A": ImagePool(args.pool_size), "B": ImagePool(args.pool_size)}
    generators = {"G_AB": model.G_AB, "G_BA": model.G_BA}       # for samples and for translating
    # Everything that has a state. Only rank 0 saves its pools; all processes resume with them.
    parts = {**model.networks(), "optimizer_G": optimizers["G"], "optimizer_D": optimizers["D"],
             "pool_A": pools["A"], "pool_B": pools["B"]}

    n_images = [len(data.paths_A), len(data.paths_B)]
    pairs_per_step = args.batch_size * runtime.world_size
    steps_per_epoch = math.ceil(max(n_images) / pairs_per_step)
    total_steps = min((args.epochs + args.epochs_decay) * steps_per_epoch, args.max_steps)
    start_step, rows = 0, []
    if checkpoint is None:
        make_out_dir(args, model)
    else:
        start_step, rows = checkpoint["pairs_seen"] // pairs_per_step, checkpoint["rows"]
        restore(args, checkpoint, parts, is_finished=start_step >= total_steps)
    steps = range(start_step + 1, total_steps + 1)
    announce(args, runtime, n_images, steps, steps_per_epoch)

    start_time = row_time = time.time()
    sums = Counter()                    # of terms since the last row of the log; update() adds
    batches = load_batches(data, steps, runtime)
    with contextlib.closing(batches):   # ends the loader processes
        for step in steps:
            lr = lr_at((step - 1) / steps_per_epoch, args)
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = lr
            request_time = time.time()
            real_A, real_B = next(batches)
            sums.update(steps=1, waiting=time.time() - request_time)    # for data, in seconds
            terms = train_step(model, optimizers, pools, runtime, real_A, real_B, step)
            sums.update(terms)

            is_stopping = runtime.mean([len(stop_signals)])[0] > 0      # in any process
            is_last = is_stopping or step == total_steps
            is_saving = is_last or step % args.save_every == 0
            is_logging = is_saving or step % args.log_every == 0
            if is_logging:
                if not all(p.isfinite().all() for p in model.parameters()):
                    die(f"step {step}: weights not finite; --resume with --amp off or a lower --lr")
                row = {"step": step, "epoch": step / steps_per_epoch, "lr": lr}
                rows.append(row | mean_terms(sums, row_time, runtime, 2 * pairs_per_step))
                sums, row_time = Counter(), time.time()
            if runtime.rank == 0:
                if is_saving:
                    save_checkpoint(args, generators, parts, step * pairs_per_step, rows)
                if is_logging:
                    write_log(f"{args.out_dir}/log.csv", rows)
                if is_last or step % args.sample_every == 0:
                    save_samples(step, generators, runtime, data)
                progress(start_time, step - start_step, len(steps))
            if is_stopping:
                break
    if runtime.rank == 0:
        print(f"see {args.out_dir}/samples; to continue (if finished, with more --epochs):\n"
              f"python cyclegan.py --resume {shlex.quote(args.out_dir)}")

# The rest of this section is what `train` calls before its loop.
def refuse_inside(path, folders):
    """Exits if a folder to write to is in one of the folders to read from."""
    for folder in folders:
        if Path(path).resolve().is_relative_to(Path(folder).resolve()):
            die(f"{path} is in {folder}: outputs would mix with inputs; choose another folder")

def make_out_dir(args, model):
    """Makes the folder of a new run. Refuses an existing run, a folder of data, or a full disk."""
    if args.out_dir is None:
        names = [os.path.basename(folders[0]) for folders in (args.dataA, args.dataB)]
        if names == ["trainA", "trainB"]:       # horse2zebra/trainA -> horse2zebra
            names = [os.path.basename(os.path.dirname(args.dataA[0]))]
        args.out_dir = "runs/" + "2".join(names)
    if os.path.exists(f"{args.out_dir}/latest.pt"):
        die(f"{args.out_dir} holds a run: --resume it, or choose another --out_dir")
    refuse_inside(args.out_dir, args.dataA + args.dataB)
    n_values = 3 * sum(p.numel() for p in model.parameters())       # a weight and two moments
    n_values += 6 * args.pool_size * args.size**2       # two pools of RGB images
    n_bytes = 2 * 4 * n_values          # float32; a new checkpoint is written beside the old one
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        if shutil.disk_usage(args.out_dir).free < n_bytes:
            die(f"disk full: {args.out_dir} needs {n_bytes / 1e9:.1f} GB for its checkpoints")
    except OSError as error:
        die(f"--out_dir: {error}")

def restore(args, checkpoint, parts, is_finished):
    """Loads all parts of a run. Refuses a changed flag if it is fixed, or if no steps are left."""
    stored, states = checkpoint["flags"], checkpoint["parts"]
    fixed = {"generator", "blocks", "ngf", "ndf", "upsample", "size", "beta1", "seed", "out_dir"}
    for name, value in stored.items():
        if getattr(args, name) != value and (is_finished or name in fixed):
            die(f"--{name} was {value} and is fixed, or no steps are left; choose a new --out_dir")
    try:
        for name in states.keys() | parts.keys():       # missing in either: KeyError
            parts[name].load_state_dict(states[name])
    except (KeyError, RuntimeError, ValueError):
        die(f"{args.out_dir}: latest.pt is from another version of cyclegan.py")

def announce(args, runtime, n_images, steps, steps_per_epoch):
    """Checks that all processes found the same images. Prints images, device and schedule."""
    if runtime.mean(n_images) != n_images:
        die(f"this process found {n_images} images of A and B, others found more or fewer")
    epoch = (steps.start - 1) / steps_per_epoch
    if runtime.rank == 0:
        print(f"{args.out_dir}: {n_images} images of [A, B], on {runtime.device}; {args.epochs} "
              f"epochs at learning rate {args.lr}, then {args.epochs_decay} down to 0; starting at "
              f"epoch {epoch:.2f}, lr {lr_at(epoch, args):.2g}; {len(steps)} steps to go")
    if args.size >= 256 and runtime.device.type == "cpu":
        print("without a GPU this takes days: try --size 64, or --demo")

# ---- 11. Translate -------------------------------------------------------------------------------
# One generator is enough, but for --round_trip: the rest was only needed to train it.
def load_generators(path, argv=()):
    """-> {"G_AB": network, "G_BA": network} on the CPU, and the run's flags, overridden by argv.
    A checkpoint of other CycleGAN code has one generator, whose flags argv must give."""
    checkpoint = load_checkpoint(path)
    args = get_args(argv, checkpoint.get("flags"))
    states = checkpoint.get("generators", {"G_AB": checkpoint})
    generators = {name: GENERATORS[args.generator](args) for name in states}
    try:
        for name, G in generators.items():
            state = states[name]
            if state is checkpoint:     # the file is one state dict: same order, other names
                weights = [w for key, w in state.items() if key.endswith(("weight", "bias"))]
                state = dict(zip(G.state_dict(), weights, strict=True))
            G.load_state_dict(state)
    except (RuntimeError, ValueError):
        die(f"{path} does not fit --generator {args.generator}, --blocks, --ngf and --size")
    return generators, args

def translate_any(G, x):
    """G for (1, 3, H, W) of any size: pads to the multiple it needs, then crops."""
    h, w = x.shape[-2:]
    x = F.pad(x, (0, -w % G.size_multiple, 0, -h % G.size_multiple), mode="replicate")
    return G(x)[..., :h, :w]

@torch.no_grad()
def translate(argv, args):
    """Translates --input into --output. Returns the exit status: 1 if an image was unreadable."""
    if None in (args.checkpoint, args.input, args.output):
        die("translating needs --checkpoint, --input and --output")
    generators, args = load_generators(args.checkpoint, argv)       # now with the run's flags
    runtime = Runtime(args)
    networks = [G.to(runtime.device) for G in generators.values()]
    if args.round_trip and len(networks) == 1:
        die("--round_trip needs both generators")
    if args.direction == "BtoA":
        networks.reverse()
    refuse_inside(args.output, args.input)
    if os.path.exists(args.output) and not args.overwrite:
        die(f"{args.output} exists: choose another --output, or --overwrite")
    images = find_images(args.input)
    if len(set(images.values())) < len(images):
        die("two images in --input would get the same name in --output")
    truths = {name: path for path, name in find_images(args.truth or []).items()}

    n_translated, errors = 0, []
    for path, name in images.items():
        if stop_signals:
            break
        image = read_image(path)
        if image is None:
            continue
        x = runtime.to_float(preprocess(image, args))[None]
        y = translate_any(networks[0], x)
        write_file(f"{args.output}/{name}.png", write_png, y)
        if args.round_trip:
            write_file(f"{args.output}/{name}_back.png", write_png, translate_any(networks[1], y))
        truth = read_image(truths[name]) if name in truths else None
        if truth is not None:
            errors.append(compare(x, y, runtime.to_float(preprocess(truth, args))))
        n_translated += 1
    print(f"translated {n_translated} of {len(images)} images into {args.output}")
    if args.truth and not errors:
        print("--truth has no image with the name of one in --input")
    if errors:
        inside, share, elsewhere = torch.tensor(errors).nanmean(dim=0)
        print(f"inside the changed region: error {inside:.3f} ({share:.1%} of leaving it "
              f"unchanged); elsewhere: error {elsewhere:.3f} (images in [-1, 1])")
    return int(n_translated < len(images))

def compare(x, y, truth):
    """Input, output, ground truth -> mean |y - truth| where x differs from the truth; its ratio to
    mean |x - truth| there; mean |y - truth| elsewhere."""
    changed = (x != truth).any(dim=1, keepdim=True).expand_as(x)
    error = (y - truth).abs()
    inside = error[changed].mean()
    return inside, inside / (x - truth).abs()[changed].mean(), error[~changed].mean()

# Three commands: train, translate A to B, translate B to A. \ joins lines.
DEMO = """\
--dataA files/toy/black --dataB files/toy/blond --size 64 --load_size 68 --generator unet --ngf 16 \
--ndf 16 --batch_size 4 --lr 1e-3 --epochs 8 --epochs_decay 16 --amp off --no-compile \
--out_dir {run}
--checkpoint {run}/generators.pt --direction AtoB --input files/toy/black_test \
--truth files/toy/blond_test --output {run}/blond --overwrite
--checkpoint {run}/generators.pt --direction BtoA --input files/toy/blond_test \
--truth files/toy/black_test --output {run}/black --overwrite"""

def demo(argv, args):
    """Draws toy faces, then runs the commands of DEMO with the flags typed after --demo."""
    from prepare_celeba import toy_faces
    toy_faces("files/toy", n=400, n_test=50)
    run = args.out_dir or "runs/demo"
    commands = DEMO.format(run=shlex.quote(run)).splitlines()
    if os.path.exists(f"{run}/latest.pt"):
        commands[0] = f"--resume {shlex.quote(run)}"
    for command in commands:
        words = shlex.split(command) + [word for word in argv if word != "--demo"]
        print("\npython cyclegan.py", shlex.join(words))
        if main(words):
            return 1
    print(f"\nnow open the last grid in {run}/samples: rows 2 and 5 are translations")

def main(argv):
    """Runs a command line, given as a list of words. Returns its exit status."""
    args = get_args(argv)
    checkpoint = None
    if args.demo:
        return demo(argv, args)
    if args.mode == "translate" or args.checkpoint:
        return translate(argv, args)
    if args.resume:
        checkpoint = load_checkpoint(f"{args.resume}/latest.pt")
        flags = checkpoint.get("flags", {})
        flags["out_dir"] = args.resume      # in the checkpoint, too: it may have moved
        args = get_args(argv, flags)
        args.resume = None                  # not stored
    train(args, checkpoint)
    return 128 + stop_signals[0] if stop_signals else 0

if __name__ == "__main__":
    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    status = main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()    # otherwise torch may abort at exit
    sys.exit(status)
