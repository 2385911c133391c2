#!/usr/bin/env python3
"""
CycleGAN in one file: learns to translate between two kinds of images from two unpaired folders.
Zhu, Park, Isola, Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
Networks", ICCV 2017, arXiv:1703.10593. Comments cite its sections (§) and equations (Eq.).

  python cyclegan.py --demo                                     # toy faces; minutes on a CPU
  python cyclegan.py --dataA files/black --dataB files/blond    # train; writes runs/black2blond
  python cyclegan.py --resume runs/black2blond                  # continue from the last checkpoint
  python cyclegan.py --checkpoint runs/black2blond/generators.pt --input photos --output out
  torchrun --standalone --nproc_per_node=8 cyclegan.py --dataA files/black --dataB files/blond

Two generators translate, one in each direction; two discriminators learn to tell real images from
translated ones. No image comes with its translation. Cycle consistency takes the place of pairs:
an image that is translated and translated back must come out unchanged.

  real_A ──G_AB──> fake_B ──G_BA──> rec_A ≈ real_A
                     └──> D_B: real or fake?
  real_B ──G_BA──> fake_A ──G_AB──> rec_B ≈ real_B
                     └──> D_A: real or fake?

  Here       G_AB   G_BA   D_A   D_B   real_A   real_B   fake_B   fake_A   rec_A     rec_B
  The paper  G      F      D_X   D_Y   x        y        G(x)     F(y)     F(G(x))   G(F(y))

Where to make changes: a generator is a class and a line in GENERATORS; a GAN loss, a function and a
line in GAN_LOSSES; a term of the objective, a line in CycleGAN.generator_loss (the log follows it);
augmentation is `preprocess`; the schedule is `lr_at`; a frozen network goes into CycleGAN.__init__;
an average of G into `generators` in `train`; gradient accumulation into `train_step`.
"""
import argparse
import contextlib
import csv
import datetime
import functools
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from torchvision.utils import save_image

def die(message):
    """Ends the program on a foreseen error: one line on stderr, exit status 2."""
    print("cyclegan.py:", " ".join(message.split()), file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(2)                     # a normal exit can wait for the other processes
    sys.exit(2)

# ---- 1. Flags ------------------------------------------------------------------------------------
# These belong to a single command and not to a run: checkpoints do not store them.
NOT_STORED = {"mode", "demo", "resume", "checkpoint", "input", "output", "overwrite", "direction",
              "native", "round_trip", "truth"}

def get_args(argv=None, stored=None):
    """-> Namespace of all flags: the defaults, then those stored in a checkpoint, then argv."""
    def bounded(value, low):
        if not low <= value <= 10**9:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and 10^9")
        return value
    def count(text):
        return bounded(int(text), 1)
    def natural(text):
        return bounded(int(text), 0)
    def number(text):
        return bounded(float(text), 0)
    def path(text):                     # absolute: a run can be resumed from another folder
        if not text:
            raise argparse.ArgumentTypeError("an empty path")
        return os.path.abspath(os.path.expanduser(text))
    parsers = {int: count, float: number, str: str, type(None): path}      # by type of the default
    def add(name, default, help, kind=None, **options):
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, (list, dict)):     # choices; the first is the default
            options["choices"] = list(default)
            default = options["choices"][0]
        else:
            options["type"] = kind or parsers[type(default)]
        group.add_argument(f"--{name}", default=default, help=help, **options)

    parser = argparse.ArgumentParser(
        usage="python cyclegan.py [flags]", description=__doc__.partition("\nTwo generators")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = die
    group = parser.add_argument_group("run")
    add("mode", ["train", "translate"], "--checkpoint implies translate (default: train)")
    add("demo", False, "draw toy faces, train on them, translate some, print the error")
    add("out_dir", None, "folder of the run (default: runs/<A>2<B>)")
    add("resume", None, "folder of a run to continue; needs no other flag")
    add("seed", 0, "of weights, data order, augmentation and image pools (default: 0)", natural)
    add("device", "auto", "cuda, cuda:1, mps or cpu (default: a GPU if there is one)")
    group = parser.add_argument_group("data")
    add("dataA", None, "folders of A images, searched recursively", nargs="+")
    add("dataB", None, "folders of B images; the sizes may differ", nargs="+")
    add("size", 256, "side of the training images, in pixels (default: 256)")
    add("load_size", None, "resize to this, then crop (default: 286/256 of --size)", count)
    add("resize", ["stretch", "crop"], "crop keeps the aspect ratio (default: stretch)")
    add("flip", True, "mirror half of the images (default: yes)")
    add("workers", None, "loading processes (default: 0 on a CPU, up to 8 on a GPU)", natural)
    group = parser.add_argument_group("networks")
    add("generator", GENERATORS, "resnet is the paper's (default: resnet)")
    add("blocks", None, "residual blocks (default: 9 from 256 pixels up, else 6)", natural)
    add("ngf", 64, "channels of a generator's first layer (default: 64)")
    add("ndf", 64, "channels of a discriminator's first layer (default: 64)")
    add("upsample", ["deconv", "nearest"], "nearest: no checkerboards (default: deconv)")
    group = parser.add_argument_group("objective")
    add("gan_loss", GAN_LOSSES, "lsgan is the paper's (default: lsgan)")
    add("lambda_cycle", 10.0, "weight of cycle consistency (default: 10)")
    add("lambda_identity", 0.5, "identity, relative to lambda_cycle (default: 0.5)")
    add("pool_size", 50, "earlier fakes kept for training D; 0 is off (default: 50)", natural)
    group = parser.add_argument_group("schedule")
    add("epochs", 100, "epochs at a constant learning rate (default: 100)", natural)
    add("epochs_decay", 100, "epochs after these, in which it decays to 0 (default: 100)", natural)
    add("max_steps", 10**9, "stop here, whatever the schedule (default: no limit)")
    add("batch_size", 1, "pairs per step in each process (default: 1)")
    add("lr", 2e-4, "learning rate of Adam (default: 2e-4)")
    add("beta1", 0.5, "first beta of Adam (default: 0.5)")
    group = parser.add_argument_group("speed")
    add("amp", ["auto", "off", "bf16", "fp16"], "mixed precision (auto: bf16 if native)")
    add("compile", ["auto", "on", "off"], "torch.compile (auto: on CUDA from 2,000 steps)")
    group = parser.add_argument_group("output")
    add("log_every", 100, "steps between rows of the log (default: 100)")
    add("sample_every", 500, "steps between sample grids (default: 500)")
    add("save_every", 2000, "steps between checkpoints (default: 2000)")
    group = parser.add_argument_group("translate")
    add("checkpoint", None, "generators.pt, or a generator from other CycleGAN code")
    add("input", None, "images, and folders of images", nargs="+")
    add("output", None, "folder that gets the same structure and names, as PNG")
    add("overwrite", False, "replace what an earlier translation wrote into --output")
    add("direction", ["AtoB", "BtoA"], "which generator to use (default: AtoB)")
    add("native", False, "translate at each image's own size instead of --size")
    add("round_trip", False, "also write NAME_back.png, translated there and back")
    add("truth", None, "folder of ground truth under the same names: print the error")

    known = vars(parser.parse_args([])).keys() - NOT_STORED
    if stored is not None and stored.keys() != known:
        difference = ", ".join(sorted(known ^ stored.keys()))[:100]
        die(f"checkpoint of another version of cyclegan.py, which differs in {difference}")
    parser.set_defaults(**(stored or {}))
    args = parser.parse_args(argv)
    if args.generator not in GENERATORS or args.gan_loss not in GAN_LOSSES:
        die(f"another version of cyclegan.py had {args.generator} or {args.gan_loss}")
    if args.checkpoint:
        args.mode = "translate"
    if args.load_size is None:
        args.load_size = args.size * 286 // 256
    if args.blocks is None:
        args.blocks = 9 if args.size >= 256 else 6
    if args.demo or (args.resume and stored is None):
        return args                     # the flags of the run are still to come
    needed = ["dataA", "dataB"] if args.mode == "train" else ["checkpoint", "input", "output"]
    for name in needed:
        if not getattr(args, name):
            die(f"--{name} is needed to {args.mode}; see --help, or try --demo")
    if args.mode == "train" and args.load_size < args.size:
        die(f"--load_size {args.load_size} is smaller than --size {args.size}")
    if args.beta1 >= 1 or args.epochs + args.epochs_decay == 0:
        die("--beta1 must be below 1, and --epochs or --epochs_decay above 0")
    return args

# ---- 2. Data -------------------------------------------------------------------------------------
# Two folders and no pairs: a step gets one image of A and an unrelated one of B. Images stay uint8
# until they are on the device, where they become floats in [-1, 1], the range of the tanh of G.
EXTENSIONS = set(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .avif".split())
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}

def find_images(top):
    """-> sorted paths of all images under a folder, without hidden ones, or the file itself."""
    if os.path.isfile(top):
        return [Path(top)]
    paths = []
    for folder, subfolders, names in os.walk(top, onerror=print):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    images = sorted(path for path in paths if path.suffix.lower() in EXTENSIONS)
    if not images:
        die(f"no images in {top}; is it the right place?")
    if len(images) < len(paths):
        print(f"{top}: skipped {len(paths) - len(images)} files of other types")
    return images

def read_image(path, min_side=None):
    """-> PIL RGB, EXIF-rotated, composited on white. Raises OSError if the file is unreadable."""
    try:
        with Image.open(path) as image:
            if min_side:                # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size
                image.draft(None, (min_side, min_side))
            image = ImageOps.exif_transpose(image)
    except Exception as error:          # decoders raise anything on broken files
        raise OSError(f"cannot read {path}: {error}") from None
    if image.mode.startswith(("I", "F")):       # the white level is not known
        raise OSError(f"cannot read {path}: it has more than 8 bits per channel; convert it to 8")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")

def preprocess(image, args, augment=False):
    """PIL RGB of any size -> (3, size, size) uint8. Augmentation crops and mirrors at random."""
    side = args.load_size if augment else args.size
    new_size = side if args.resize == "crop" else (side, side)      # a number: the shorter side
    image = TF.resize(image, new_size, T.InterpolationMode.BICUBIC)
    if augment:
        image = T.RandomCrop(args.size)(image)
    if augment and args.flip:
        image = T.RandomHorizontalFlip()(image)
    return TF.pil_to_tensor(TF.center_crop(image, args.size))

def seed_torch(*key):
    """Makes torch's random numbers from here on a pure function of the key."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))

class UnpairedImages(torch.utils.data.Dataset):
    """Item n of an endless stream: an image of A and one of B, (3, size, size) uint8. Every lap
    through a domain has a new order. An item is a pure function of (seed, n), so a resumed run sees
    the same images, whatever the number of workers."""
    def __init__(self, args):
        self.args = args
        self.paths_A = [path for folder in args.dataA for path in find_images(folder)]
        self.paths_B = [path for folder in args.dataB for path in find_images(folder)]
        path, n_times = Counter(self.paths_A + self.paths_B).most_common(1)[0]
        if n_times > 1:
            die(f"--dataA, --dataB: {path} is given twice")

    def __getitem__(self, n):
        return self.load_item(self.paths_A, n, "A"), self.load_item(self.paths_B, n, "B")

    def load_item(self, paths, n, domain):
        lap, i = divmod(n, len(paths))
        k = np.random.default_rng((self.args.seed, lap, ord(domain))).permutation(len(paths))[i]
        seed_torch(self.args.seed, n, domain)
        for _ in range(100):
            try:
                image = read_image(paths[k], self.args.load_size)
            except OSError as error:    # one broken file must not end a long run
                print(f"{error}; another image is used instead", file=sys.stderr, flush=True)
                k = torch.randint(len(paths), ())
            else:
                return preprocess(image, self.args, augment=True)
        die(f"{paths[k].parent}: gave up after 100 unreadable images")

def ignore_signals(_):
    """For loader processes: the main process decides when to stop and needs data until then."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

def load_batches(data, steps, runtime):
    """Yields real_A, real_B for a range of steps: (N, 3, size, size) in [-1, 1], on the device."""
    args = data.args
    num_workers = args.workers
    if num_workers is None:
        num_workers = min(8, os.cpu_count()) if runtime.is_cuda else 0
    pairs_per_step = args.batch_size * runtime.world_size
    pairs = range((steps.start - 1) * pairs_per_step, (steps.stop - 1) * pairs_per_step)
    loader = torch.utils.data.DataLoader(
        data, args.batch_size, sampler=pairs[runtime.rank::runtime.world_size],
        num_workers=num_workers, worker_init_fn=ignore_signals, pin_memory=runtime.is_cuda)
    for real_A, real_B in loader:
        yield runtime.to_float(real_A), runtime.to_float(real_B)

# ---- 3. Generators -------------------------------------------------------------------------------
# Image in, image out: (N, 3, H, W) in [-1, 1], fully convolutional. Three choices of the paper:
# reflection padding, because a border of zeros would show; instance norm, because contrast belongs
# to an image and not to a batch; tanh, whose range is that of the images.
class InstanceNorm(nn.Module):
    """Each channel of an image to mean 0, variance 1: (N, C, H, W) -> same. Not nn.InstanceNorm2d,
    whose CPU gradients are wrong for a single image in channels_last (torch 2.15)."""
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):      # on CUDA it would give float32
            return F.group_norm(x, num_groups=x.shape[1])

def upsample(n_in, n_out, args, kernel_size=3):
    """(N, n_in, H, W) -> (N, n_out, 2H, 2W). The paper has transposed convolutions (§7.2);
    resizing before a convolution avoids their checkerboard artifacts (Odena et al. 2016)."""
    if args.upsample == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(n_in, n_out, 3, padding=1))
    output_padding = kernel_size % 2    # so that the size doubles exactly
    return nn.ConvTranspose2d(n_in, n_out, kernel_size, 2, padding=1, output_padding=output_padding)

class ResidualBlock(nn.Module):
    """x + f(x), (N, n, H, W) -> same: the identity, most of the task, need not be learned."""
    def __init__(self, n):
        super().__init__()
        self.conv1 = nn.Conv2d(n, n, 3, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(n, n, 3, padding=1, padding_mode="reflect")
        self.norm = InstanceNorm()

    def forward(self, x):
        y = self.norm(self.conv1(x)).relu()
        return x + self.norm(self.conv2(y))

class ResNetGenerator(nn.Module):
    """The paper's generator (§7.2): 11,378,179 parameters with 9 blocks, 7,837,699 with 6."""
    size_multiple = 4                               # what H and W must be divisible by

    def __init__(self, args):
        super().__init__()
        n = args.ngf
        self.stem = nn.Conv2d(3, n, 7, padding=3, padding_mode="reflect")
        self.down1 = nn.Conv2d(n, 2 * n, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * n, 4 * n, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*[ResidualBlock(4 * n) for _ in range(args.blocks)])
        self.up1 = upsample(4 * n, 2 * n, args)
        self.up2 = upsample(2 * n, n, args)
        self.head = nn.Conv2d(n, 3, 7, padding=3, padding_mode="reflect")
        self.norm = InstanceNorm()

    def forward(self, x):                           # (N,   3, H,   W)
        x = self.norm(self.stem(x)).relu()          # (N,  64, H,   W)
        x = self.norm(self.down1(x)).relu()         # (N, 128, H/2, W/2)
        x = self.norm(self.down2(x)).relu()         # (N, 256, H/4, W/4)
        x = self.blocks(x)                          # (N, 256, H/4, W/4)
        x = self.norm(self.up1(x)).relu()           # (N, 128, H/2, W/2)
        x = self.norm(self.up2(x)).relu()           # (N,  64, H,   W)
        return self.head(x).tanh()                  # (N,   3, H,   W)

class UNetGenerator(nn.Module):
    """The U-Net of pix2pix, 54,409,603 parameters at 256 pixels. Its levels are nested: each halves
    the resolution, calls the level inside, doubles it again and concatenates that to its input."""
    size_multiple = 32                              # required of --size; each network: 2**levels

    def __init__(self, args, level=1, n_in=3):
        super().__init__()
        levels = max(k for k in range(9) if args.size % 2**k == 0)
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
        if self.inside is not None:                 # innermost, a norm could turn 1x1 into 0
            y = self.inside(self.norm(y))           # (N, 2n,   H/2, W/2)
        y = self.norm(self.up(y.relu()))            # (N, n_in, H,   W)
        return torch.cat([x, y], dim=1)             # (N, 2n_in, H,  W)

GENERATORS = {"resnet": ResNetGenerator, "unet": UNetGenerator}

# ---- 4. Discriminator ----------------------------------------------------------------------------
# A score for each 70x70 patch instead of one for the image (§4): texture and color can be judged
# locally, and the cycle preserves the layout. Seen from the output, the receptive field of a score
# grows by side = (side - 1) * stride + 4 per layer: 1, 4, 7, 16, 34, 70.
class PatchDiscriminator(nn.Sequential):
    """The 70x70 PatchGAN (§7.2), 2,764,737 parameters. Raw scores; a sigmoid is up to the loss."""
    def __init__(self, args):
        n = args.ndf
        super().__init__(                                       # (N,   3, H,     W)
            nn.Conv2d(3, n, 4, stride=2, padding=1),            # (N,  64, H/2,   W/2)
            nn.LeakyReLU(0.2),
            nn.Conv2d(n, 2 * n, 4, stride=2, padding=1),        # (N, 128, H/4,   W/4)
            InstanceNorm(), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * n, 4 * n, 4, stride=2, padding=1),    # (N, 256, H/8,   W/8)
            InstanceNorm(), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * n, 8 * n, 4, stride=1, padding=1),    # (N, 512, H/8-1, W/8-1)
            InstanceNorm(), nn.LeakyReLU(0.2),
            nn.Conv2d(8 * n, 1, 4, stride=1, padding=1))        # (N,   1, H/8-2, W/8-2)

    def forward(self, x):
        return super().forward(x)       # torch 2.11 compiles only what has a forward of its own

def init_weights(module):
    """N(0, 0.02) for the kernel of a convolution (§7.1), 0 for its bias."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        for parameter in module.parameters():       # .weight is computed if a fork normalizes it
            nn.init.normal_(parameter, 0.0, 0.02 if parameter.ndim == 4 else 0.0)

# ---- 5. Image pool -------------------------------------------------------------------------------
# A discriminator that sees only the newest fakes forgets old ones, so the generators can bring them
# back: training oscillates. So half of the fakes it sees are older (§4, Shrivastava et al. 2017).
class ImagePool:
    """Up to `size` earlier fakes of one domain; size 0 is off."""
    def __init__(self, size):
        self.size = size
        self.images = []

    def query(self, fakes):
        """(N, 3, H, W), detached -> same. A full pool exchanges half of them for stored ones."""
        result = []
        for fake in fakes:
            if len(self.images) < self.size:
                self.images.append(fake.clone())
            elif self.size > 0 and torch.rand(()) < 0.5:
                k = int(torch.randint(self.size, ()))
                stored = self.images[k].to(fake)    # a loaded pool is on the CPU
                self.images[k] = fake.clone()
                fake = stored
            result.append(fake)
        return torch.stack(result)

    def state_dict(self):
        return {"images": [image.cpu() for image in self.images]}

    def load_state_dict(self, state):
        self.images = state["images"][:self.size]

# ---- 6. Objective --------------------------------------------------------------------------------
# Three terms for the generators. Adversarial (Eq. 1): the output looks like the other domain, but
# alone it would allow one such image for all inputs (collapse). Cycle (Eq. 2): translating back
# recovers the input, but alone it would allow any reversible change, such as inverted colors.
# Identity (§5.2): G_AB leaves a real B as it is, which keeps colors; with too much of it, copying
# the input becomes the best answer.
#   Healthy lsgan runs have D_A and D_B between 0.1 and 0.25 (0.25 is guessing), adv between 0.3 and
# 0.6, D(real) and D(fake) apart but near 0.5; cycle and idt, logged with their weights, fall for
# many epochs. D_A, D_B near 0 and adv near 1: D has won, or G copies its input (see the samples).
def lsgan(scores, target):
    """Least squares (§4, Mao et al. 2017): even a fake that fools D is pulled to the target."""
    return F.mse_loss(scores, torch.full_like(scores, target))

def bce(scores, target, reduction="mean"):
    """Cross-entropy on logits: Eq. 1, with the non-saturating loss for G."""
    targets = torch.full_like(scores, target)
    return F.binary_cross_entropy_with_logits(scores, targets, reduction=reduction)

def focal(scores, target, gamma=2.0):
    """Lin et al. 2017, Eq. 4: cross-entropy times (1 - p)^gamma, so easy patches count less."""
    entropy = bce(scores, target, reduction="none")
    p = (-entropy).exp()                # the probability that D gives to the right answer
    return ((1 - p) ** gamma * entropy).mean()

def ghm(scores, target, n_bins=10):
    """GHM-C, Li et al. 2019, Eq. 7: mean cross-entropy per bin of equal gradient |p - target|, then
    mean over the bins, so neither the many easy patches nor a few outliers dominate."""
    entropy = bce(scores, target, reduction="none").flatten()
    gradient = (scores.detach().sigmoid() - target).abs().flatten()
    bins = (gradient * n_bins).long().clamp(max=n_bins - 1)
    n_in_bin = F.one_hot(bins, n_bins).sum(dim=0)
    return (entropy / n_in_bin[bins]).sum() / (n_in_bin > 0).sum()

# name: (loss of D, loss of G). Focal and GHM-C are for D; their G gets plain cross-entropy.
GAN_LOSSES = {"lsgan": (lsgan, lsgan), "bce": (bce, bce), "focal": (focal, bce), "ghm": (ghm, bce)}

class CycleGAN(nn.Module):
    """Two generators, two discriminators, and what each pair minimizes."""
    def __init__(self, args):
        super().__init__()
        Generator = GENERATORS[args.generator]
        if args.size < 32 or args.size % Generator.size_multiple:
            die(f"--size {args.size} must be a multiple of {Generator.size_multiple}, at least 32")
        self.G_AB, self.G_BA = Generator(args), Generator(args)
        self.D_A, self.D_B = PatchDiscriminator(args), PatchDiscriminator(args)
        for network in (self.G_AB, self.G_BA, self.D_A, self.D_B):
            network.apply(init_weights)
        self.d_loss, self.g_loss = GAN_LOSSES[args.gan_loss]
        self.lambda_cycle = args.lambda_cycle
        self.lambda_identity = args.lambda_cycle * args.lambda_identity     # the flag is relative

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
        invariant to the scale of a loss. -> loss, terms: both losses, and mean scores to log."""
        score_real_A, score_fake_A = self.D_A(torch.cat([real_A, fake_A])).chunk(2)
        score_real_B, score_fake_B = self.D_B(torch.cat([real_B, fake_B])).chunk(2)
        loss_A = 0.5 * (self.d_loss(score_real_A, 1.0) + self.d_loss(score_fake_A, 0.0))
        loss_B = 0.5 * (self.d_loss(score_real_B, 1.0) + self.d_loss(score_fake_B, 0.0))
        terms = {"D_A": loss_A, "D_B": loss_B,
                 "D(real)": torch.cat([score_real_A, score_real_B]).mean(),
                 "D(fake)": torch.cat([score_fake_A, score_fake_B]).mean()}
        return loss_A + loss_B, terms

# ---- 7. One step ---------------------------------------------------------------------------------
def train_step(model, optimizers, pools, runtime, real_A, real_B, step):
    """Updates the generators, then the discriminators. Images (N, 3, H, W) in [-1, 1] -> terms."""
    seed_torch(runtime.args.seed, step, runtime.rank)   # a resumed run draws the same numbers
    model.D_A.requires_grad_(False)     # G's gradient passes through D, but D's own is not needed
    model.D_B.requires_grad_(False)
    with runtime.autocast():
        loss, terms_G, fake_A, fake_B = model.generator_loss(real_A, real_B)
    runtime.backward(loss)
    runtime.step(optimizers["G"])

    model.D_A.requires_grad_(True)
    model.D_B.requires_grad_(True)
    fake_A = pools["A"].query(fake_A)   # detached: from here on no gradient reaches the generators
    fake_B = pools["B"].query(fake_B)
    with runtime.autocast():
        loss, terms_D = model.discriminator_loss(real_A, real_B, fake_A, fake_B)
    runtime.backward(loss)
    runtime.step(optimizers["D"])
    return {name: term.detach() for name, term in (terms_G | terms_D).items()}

# ---- 8. Runtime ----------------------------------------------------------------------------------
# Skip on first reading: device, precision and processes. Nothing here changes the mathematics.
class Runtime:
    """Where a step runs. torchrun starts `world_size` processes, each with a `rank` of its own."""
    def __init__(self, args):
        self.args = args
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        name = args.device
        if name == "auto":
            name = "cpu"
            if torch.accelerator.is_available():
                name = torch.accelerator.current_accelerator().type
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(name)
            torch.zeros(1, device=self.device).item()
        except Exception as error:      # each kind of device raises its own
            die(f"--device {name} is not available ({str(error)[:80]}); try --device cpu")
        self.is_cuda = self.device.type == "cuda"
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True       # tries all algorithms once per size
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.is_cuda else "gloo")
        self.precision = self.best_precision() if args.amp == "auto" else args.amp
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def best_precision(self):
        if self.is_cuda:                # a T4 emulates bf16, slowly
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        if self.device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
            return "bf16" if torch.cpu._is_avx512_bf16_supported() else "off"
        return "off"

    def autocast(self):
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "off")

    def compile(self, model, n_steps):
        """Compiles the networks; --compile auto does so if it pays, and carries on if it cannot."""
        is_auto = self.args.compile == "auto"
        if self.args.compile == "on" or (is_auto and self.is_cuda and n_steps >= 2000):
            torch._dynamo.config.suppress_errors = is_auto
            for network in (model.G_AB, model.G_BA, model.D_A, model.D_B):
                network.compile(dynamic=False)

    def to_float(self, images):
        """uint8 -> float in [-1, 1], on the device."""
        return images.to(self.device, non_blocking=True).float() / 127.5 - 1

    def backward(self, loss):
        self.scaler.scale(loss).backward()      # scaled in fp16 only

    def step(self, optimizer):
        """Updates parameters by their gradients, averaged over processes; frees the gradients."""
        self.average([p.grad for group in optimizer.param_groups for p in group["params"]])
        self.scaler.step(optimizer)     # after averaging: an overflow is skipped everywhere
        self.scaler.update()
        optimizer.zero_grad()

    def average(self, tensors):
        """Replaces tensors by their means over all processes, in one all-reduce."""
        if self.world_size == 1:
            return
        flat = nn.utils.parameters_to_vector(tensors)       # good for gradients, too
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            die(f"lost the other processes ({error}); --resume continues from the last checkpoint")
        nn.utils.vector_to_parameters(flat / self.world_size, tensors)

    def mean(self, numbers):
        """-> the mean of each number over all processes."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self.average([tensor])
        return tensor.tolist()

    def check_same(self, numbers, what):
        """Exits if processes have different numbers: they would not stay in step."""
        if self.mean(numbers) != numbers:
            die(f"this process found {numbers} {what}, others found more or fewer")

    def print(self, text):
        if self.rank == 0:
            print(text, flush=True)

# ---- 9. Outputs ----------------------------------------------------------------------------------
N_SAMPLES = 6           # images per row of the sample grids
save_png = functools.partial(
    save_image, format="png", nrow=N_SAMPLES, normalize=True, value_range=(-1, 1))

def write_file(path, write, content):
    """write(content, file) gets a temporary file: a crash or a full disk leaves the old one."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.part", "wb") as file:
            write(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:       # torch.save raises the latter
        with contextlib.suppress(OSError):
            os.remove(f"{path}.part")
        die(f"cannot write {path} ({error}); is the disk full? An existing file is unchanged")

def progress(text, start_time, done, total):
    """A live line with the time left: on a terminal, from the fifth of `total` steps on."""
    if done >= 5 and sys.stdout.isatty():
        seconds = int((time.time() - start_time) / done * (total - done))
        print(f"{text}, {datetime.timedelta(seconds=seconds)} left\033[K", end="\r", flush=True)

@torch.no_grad()
def save_samples(args, step, generators, runtime, real_A, real_B):
    """Writes a grid, a column per image. Rows: real A, fake B, rec A, real B, fake A, rec B. Rows 2
    and 5 are the translations; rows 3 and 6, translated back, should equal rows 1 and 4."""
    G_AB = generators["G_AB"].forward           # not compiled: this batch has another size
    G_BA = generators["G_BA"].forward
    with runtime.autocast():
        real_A, real_B = runtime.to_float(real_A), runtime.to_float(real_B)
        fake_B, fake_A = G_AB(real_A), G_BA(real_B)
        rows = [real_A, fake_B, G_BA(fake_B), real_B, fake_A, G_AB(fake_A)]
    write_file(f"{args.out_dir}/samples/step_{step:07}.png", save_png, torch.cat(rows).float())

class Log:
    """The rows of log.csv: the mean of each term over the steps since the row before."""
    def __init__(self):
        self.rows = []                  # all of them: checkpoints contain the log
        self.n_printed = 0
        self.start_row()

    def start_row(self):
        self.sums, self.n_steps = Counter(), 0
        self.start_time, self.data_time = time.time(), 0.0

    def add(self, terms, data_time):
        """Adds the terms of a step, without waiting for the device, and its wait for data (s)."""
        self.sums.update(terms)         # a Counter adds
        self.n_steps += 1
        self.data_time += data_time

    def end_row(self, step, epoch, lr, images_per_step, runtime):
        """Ends a row with this step: means over its steps and over all processes."""
        means = runtime.mean([float(total) / self.n_steps for total in self.sums.values()])
        if not np.isfinite(means).all():
            die(f"step {step}: {[*self.sums]} = {means}; --resume with a lower --lr or --amp off")
        seconds = time.time() - self.start_time
        self.rows.append({
            "step": step, "epoch": epoch, "lr": lr, **dict(zip(self.sums, means)),
            "waiting": self.data_time / seconds, "img/s": images_per_step * self.n_steps / seconds})
        self.start_row()

    def write(self, path):
        """Writes log.csv and prints the last row. If the file is locked, it is written later."""
        names = dict.fromkeys(name for row in self.rows for name in row)   # --resume may add
        try:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(self.rows)
        except OSError as error:
            print(f"cannot write {path} ({error.strerror}); trying again with the next row")
        if self.n_printed % 20 == 0:
            print(" ".join(f"{name:>7}" for name in self.rows[-1]))
        self.n_printed += 1
        step, *values = self.rows[-1].values()
        print(f"{step:7}", *[f"{value:7.3g}" for value in values], flush=True)

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]

def save_checkpoint(args, generators, parts, pairs_seen, n_images):
    """Writes latest.pt, from which --resume continues, then generators.pt, for translating."""
    for name in ("G_AB", "G_BA", "D_A", "D_B"):
        if not all(parameter.isfinite().all() for parameter in parts[name].parameters()):
            die(f"{name} is not finite. The last checkpoint is kept; try a lower --lr or --amp off")
    flags = {name: value for name, value in vars(args).items() if name not in NOT_STORED}
    weights = {name: G.state_dict() for name, G in generators.items()}
    shared = {"flags": flags, "generators": weights}
    states = {name: part.state_dict() for name, part in parts.items()}
    # `shared` is in both files, so that both can translate; torch.save stores a tensor only once.
    latest = {**shared, "parts": states, "pairs_seen": pairs_seen, "n_images": n_images}
    write_file(f"{args.out_dir}/latest.pt", torch.save, latest)
    write_file(f"{args.out_dir}/generators.pt", torch.save, shared)

def load_checkpoint(path):
    """-> the dict in a checkpoint, its tensors on the CPU."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:          # torch.load raises anything on a broken file
        die(f"{path} is not a checkpoint, or a truncated one ({str(error)[:80]})")

# ---- 10. Train -----------------------------------------------------------------------------------
def lr_at(epoch, args):
    """The learning rate at a (fractional) epoch: constant, then linear to 0 (§7.1). It depends on
    the flags only, so --resume with more --epochs can raise it again."""
    if epoch < args.epochs:
        return args.lr
    return args.lr * (1 - (epoch - args.epochs) / args.epochs_decay)

def set_lr(optimizers, epoch, args):
    """Sets the learning rate, and beta1 in case --resume changed it. -> the learning rate."""
    lr = lr_at(epoch, args)
    for optimizer in optimizers.values():
        optimizer.param_groups[0].update(lr=lr, betas=(args.beta1, 0.999))
    return lr

def make_optimizers(model, args):
    """-> Adam (§7.1) for the generators and for the discriminators."""
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, 0.999), fused=True)
    parameters_G = [*model.G_AB.parameters(), *model.G_BA.parameters()]
    parameters_D = [*model.D_A.parameters(), *model.D_B.parameters()]
    n_trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert n_trainable == len(parameters_G + parameters_D), "freeze networks without an optimizer"
    return {"G": adam(parameters_G), "D": adam(parameters_D)}

def train(args, checkpoint=None):
    """Trains from scratch or from a checkpoint; fills args.out_dir. Returns the exit status."""
    runtime, data, log = Runtime(args), UnpairedImages(args), Log()
    torch.manual_seed(args.seed)        # the same initial weights in every process
    model = CycleGAN(args).to(runtime.device)
    optimizers = make_optimizers(model, args)
    pools = {"A": ImagePool(args.pool_size), "B": ImagePool(args.pool_size)}
    generators = {"G_AB": model.G_AB, "G_BA": model.G_BA}       # for samples and for translating
    # All that a resumed run needs. With several processes, all of them get the pools of rank 0.
    parts = {"G_AB": model.G_AB, "G_BA": model.G_BA, "D_A": model.D_A, "D_B": model.D_B,
             "optimizer_G": optimizers["G"], "optimizer_D": optimizers["D"],
             "scaler": runtime.scaler, "pool_A": pools["A"], "pool_B": pools["B"], "log": log}

    n_images = [len(data.paths_A), len(data.paths_B)]
    runtime.check_same(n_images, "images of A and B")
    pairs_per_step = args.batch_size * runtime.world_size
    steps_per_epoch = math.ceil(max(n_images) / pairs_per_step)
    total_steps = min((args.epochs + args.epochs_decay) * steps_per_epoch, args.max_steps)
    start_step = 0
    if checkpoint is None:
        make_out_dir(args, model)
    else:
        start_step = restore(args, parts, checkpoint, n_images, pairs_per_step, total_steps)
    steps = range(start_step + 1, total_steps + 1)
    announce(args, runtime, n_images, steps, steps_per_epoch)
    runtime.compile(model, len(steps))
    samples = torch.utils.data.default_collate([data[n] for n in range(N_SAMPLES)])
    log.start_row()

    start_time = time.time()
    batches = load_batches(data, steps, runtime)
    with catch_signals() as signals, contextlib.closing(batches):       # ends loader processes
        for step in steps:
            lr = set_lr(optimizers, (step - 1) / steps_per_epoch, args)
            request_time = time.time()
            real_A, real_B = next(batches)
            data_time = time.time() - request_time
            terms = train_step(model, optimizers, pools, runtime, real_A, real_B, step)
            log.add(terms, data_time)

            is_stopping = runtime.mean([len(signals)])[0] > 0   # a signal to one process stops all
            is_last = is_stopping or step == total_steps
            is_saving = is_last or step % args.save_every == 0
            is_logging = is_saving or step % args.log_every == 0
            if is_logging:
                log.end_row(step, step / steps_per_epoch, lr, 2 * pairs_per_step, runtime)
            if runtime.rank == 0:
                if is_saving:
                    save_checkpoint(args, generators, parts, step * pairs_per_step, n_images)
                if is_logging:
                    log.write(f"{args.out_dir}/log.csv")
                if is_last or step % args.sample_every == 0:
                    save_samples(args, step, generators, runtime, *samples)
                progress(f"step {step}/{total_steps}", start_time, step - start_step, len(steps))
            if is_stopping:
                runtime.print(f"stopped after step {step} and saved; continue with:\n"
                              f"python cyclegan.py --resume {shlex.quote(args.out_dir)}")
                return 128 + (signals or [signal.SIGTERM])[0]
    runtime.print(f"finished {total_steps} steps: see {args.out_dir}/samples")
    return 0

# The rest of this section is what `train` calls before and after its loop.
def announce(args, runtime, n_images, steps, steps_per_epoch):
    """Prints what is trained on, where, and on which schedule."""
    done_epochs = (steps.start - 1) / steps_per_epoch
    n_pairs = args.batch_size * runtime.world_size
    runtime.print(
        f"{args.out_dir}: {n_images[0]:,} images of A, {n_images[1]:,} of B; {n_pairs} pairs per "
        f"step on {runtime.world_size} x {runtime.device}, precision {runtime.precision}\n"
        f"{args.epochs} epochs at learning rate {args.lr:g}, then {args.epochs_decay} down to 0, "
        f"{steps_per_epoch:,} steps each; {len(steps):,} steps to go from epoch {done_epochs:.2f}")
    if args.size >= 256 and runtime.device.type == "cpu":
        runtime.print("without a GPU this takes days: try --size 64, or --demo")

def refuse_inside(path, folders):
    """Exits if a folder to write to is in one of the folders to read from."""
    for folder in folders:
        if Path(path).resolve().is_relative_to(Path(folder).resolve()):
            die(f"{path} is in {folder}: their images would get mixed up; choose another folder")

def make_out_dir(args, model):
    """Makes the folder of a new run. Refuses to overwrite, to write into data, or a full disk."""
    names = [os.path.basename(folders[0]) for folders in (args.dataA, args.dataB)]
    if names == ["trainA", "trainB"]:   # as in horse2zebra/trainA
        names = [os.path.basename(os.path.dirname(args.dataA[0]))]
    args.out_dir = args.out_dir or os.path.abspath(os.path.join("runs", "2".join(names)))
    for name in ("latest.pt", "generators.pt"):
        if os.path.exists(f"{args.out_dir}/{name}"):
            die(f"{args.out_dir} holds a run: --resume it, or choose another --out_dir")
    refuse_inside(args.out_dir, args.dataA + args.dataB)
    try:
        os.makedirs(args.out_dir, exist_ok=True)
    except OSError as error:
        die(f"cannot make --out_dir {args.out_dir} ({error.strerror})")

    n_values = 3 * sum(p.numel() for p in model.parameters())       # Adam has two moments for each
    n_values += 2 * args.pool_size * 3 * args.size**2
    n_bytes = 2 * 4 * n_values          # a new checkpoint is written beside the old one
    if shutil.disk_usage(args.out_dir).free < n_bytes:
        die(f"disk full: {args.out_dir} needs {n_bytes / 1e9:.1f} GB for its checkpoints")

def resume(argv, run):
    """-> the flags of a run, updated by those in argv, and its checkpoint."""
    run = run.removesuffix(f"{os.sep}latest.pt")
    checkpoint = load_checkpoint(os.path.join(run, "latest.pt"))
    if "parts" not in checkpoint:
        die(f"{run}: latest.pt is from another version of cyclegan.py")
    stored = checkpoint["flags"]
    stored["out_dir"] = run             # the folder may have been moved since
    args = get_args(argv, stored)
    for name in ("generator", "blocks", "ngf", "ndf", "upsample", "size", "seed", "out_dir"):
        if getattr(args, name) != stored[name]:
            die(f"--{name} cannot be changed when resuming; the run has {stored[name]}")
    return args, checkpoint

def restore(args, parts, checkpoint, n_images, pairs_per_step, total_steps):
    """Loads every part of a run -> its last step. Exits if a new flag cannot act any more."""
    stored, states = checkpoint["flags"], checkpoint["parts"]
    if states.keys() != parts.keys():
        die(f"checkpoint of another version of cyclegan.py: {states.keys() ^ parts.keys()} differ")
    step = checkpoint["pairs_seen"] // pairs_per_step       # --batch_size may have changed
    changed = {name for name in stored if getattr(args, name) != stored[name]}
    if changed and step >= total_steps:
        die(f"{args.out_dir} is finished, {changed} would change nothing; choose another --out_dir")
    if checkpoint["n_images"] != n_images:
        print(f"{n_images} images of A and B, {checkpoint['n_images']} before: the run differs now")
    for name, part in parts.items():
        try:
            if states[name]:            # empty: the scaler of a run without fp16
                part.load_state_dict(states[name])
        except RuntimeError:
            die(f"checkpoint of another version of cyclegan.py, whose {name} differs")
    return step

@contextlib.contextmanager
def catch_signals():
    """Yields a list that receives signals to stop; the loop checks it after each step."""
    received, old_handlers = [], {}

    def handler(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step, then saving; "
                    b"press Ctrl-C again to stop without saving\n")

    if threading.current_thread() is threading.main_thread():   # others may not handle any
        old_handlers = {number: signal.signal(number, handler) for number in STOP_SIGNALS
                        if signal.getsignal(number) != signal.SIG_IGN}      # nohup ignores SIGHUP
    try:
        yield received
    finally:
        for number, old_handler in old_handlers.items():
            signal.signal(number, old_handler)

# ---- 11. Translate -------------------------------------------------------------------------------
# One generator is enough: the other one and the discriminators were only needed to train it.
def load_generators(path):
    """-> {"AtoB": network, "BtoA": network} on the CPU, and the flags of their run, if known."""
    checkpoint = load_checkpoint(f"{path}/generators.pt" if os.path.isdir(path) else path)
    if "generators" not in checkpoint:
        G = load_foreign_generator(checkpoint, path)
        return {"AtoB": G, "BtoA": G}, None
    flags, states = checkpoint["flags"], checkpoint["generators"]
    generators = {}
    try:
        for direction, name in {"AtoB": "G_AB", "BtoA": "G_BA"}.items():
            generators[direction] = GENERATORS[flags["generator"]](argparse.Namespace(**flags))
            generators[direction].load_state_dict(states[name])
    except (AttributeError, KeyError, RuntimeError):
        die(f"{path}: its generators are those of another version of cyclegan.py")
    return generators, flags

def translate_any(G, x):
    """G for (1, 3, H, W) of any size: pads by reflection to the multiple it needs, then crops."""
    h, w = x.shape[-2:]
    bottom, right = (max(-side % G.size_multiple, 8 - side) for side in (h, w))    # 8: 2 at H/4
    mode = "reflect" if bottom < h and right < w else "replicate"
    return G(F.pad(x, (0, right, 0, bottom), mode=mode))[..., :h, :w]

def name_images(tops):
    """-> {name: path} of images and folders of images; a name is relative and has no suffix."""
    images = {}
    for top in tops:
        for path in find_images(top):
            name = path.relative_to(top) if path != Path(top) else Path(path.name)
            name = str(name.with_suffix(""))
            if name in images:
                die(f"{path} and {images[name]} would both become {name}.png")
            images[name] = path
    return images

def compare(x, y, truth):
    """Input, output, ground truth, (1, 3, H, W) in [-1, 1] -> sums over pixels, for --truth."""
    changed = (x != truth).any(dim=1)
    error = (y - truth).abs().mean(dim=1)
    mse = ((y - truth) / 2).square().mean()
    return {
        "images": 1, "PSNR": -10 * mse.log10().item(),
        "pixels": error.numel(), "error": error.sum().item(),
        "changed pixels": changed.sum().item(), "changed error": error[changed].sum().item(),
        "input error": (x - truth).abs().mean(dim=1).sum().item()}

def report(totals):
    """Prints the sums of compare() as means."""
    n_images, n_inside = totals["images"], totals["changed pixels"]
    inside = totals["changed error"] / max(1, n_inside)
    share = totals["changed error"] / max(1e-9, totals["input error"])
    error_outside = totals["error"] - totals["changed error"]
    outside = error_outside / max(1, totals["pixels"] - n_inside)
    print(f"compared {n_images}: PSNR {totals['PSNR'] / n_images:.1f} dB, mean absolute error "
          f"{totals['error'] / totals['pixels']:.3f} (images from -1 to 1)")
    print(f"inside the changed region: error {inside:.3f} ({share:.1%} of leaving it unchanged); "
          f"outside: error {outside:.3f}", flush=True)

def check_output(args, names):
    """Refuses to mix outputs into --input or --truth, and to overwrite files unless told to."""
    refuse_inside(args.output, filter(os.path.isdir, [*args.input, args.truth or ""]))
    endings = [".png", "_back.png"] if args.round_trip else [".png"]
    outputs = Counter(f"{args.output}/{name}{ending}" for name in names for ending in endings)
    for path, n_times in outputs.items():
        if n_times > 1:
            die(f"two images would become {path}; rename one")
        if os.path.exists(path) and not args.overwrite:
            die(f"{path} exists: choose another --output, or --overwrite")

@torch.no_grad()
def translate(argv, args):
    """Translates --input into --output. Returns the exit status: 1 if an image was unreadable."""
    generators, flags = load_generators(args.checkpoint)
    if flags is not None:               # preprocess as in training
        args = get_args(argv, flags | {"device": "auto"})
    elif args.round_trip:
        die(f"--round_trip needs both generators; {args.checkpoint} has one")
    runtime = Runtime(args)
    G = generators[args.direction].to(runtime.device)
    G_back = generators["BtoA" if args.direction == "AtoB" else "AtoB"].to(runtime.device)
    images = name_images(args.input)
    truths = name_images([args.truth]) if args.truth else {}
    names = list(images)[runtime.rank::runtime.world_size]
    check_output(args, names)
    if args.truth and truths.keys().isdisjoint(images):
        die(f"--truth {args.truth}: no image there has the name of one in --input")

    def load(path):
        image = read_image(path)
        pixels = TF.pil_to_tensor(image) if args.native else preprocess(image, args)
        return runtime.to_float(pixels)[None]

    totals, n_unreadable, start_time = Counter(), 0, time.time()
    for i, name in enumerate(names, 1):
        try:
            x = load(images[name])
            y = translate_any(G, x)
            write_file(f"{args.output}/{name}.png", save_png, y)
            if args.round_trip:
                write_file(f"{args.output}/{name}_back.png", save_png, translate_any(G_back, y))
            if name in truths:
                truth = load(truths[name])
                if truth.shape == x.shape:      # it may not be with --native
                    totals.update(compare(x, y, truth))
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
            n_unreadable += 1
        progress(f"{i}/{len(names)}", start_time, i, len(names))
    n_translated = len(names) - n_unreadable
    print(f"translated {n_translated} of {len(names)} images into {args.output}", flush=True)
    if totals["images"]:
        report(totals)
    return int(n_unreadable > 0)

def load_foreign_generator(state, path):
    """-> the generator in a bare state_dict of other CycleGAN code. Layers have other names there,
    but the same order, and their shapes tell the flags."""
    weights = [value for name, value in state.items()
               if torch.is_tensor(value) and value.ndim > 0 and "running" not in name]
    kernels = [weight.shape for weight in weights if weight.ndim == 4]
    if len(kernels) < 6:
        die(f"{path}: no generator found, or one of another version of cyclegan.py")
    args = argparse.Namespace(
        generator="unet" if kernels[0][2] == 4 else "resnet", ngf=kernels[0][0],
        size=2 ** (len(kernels) // 2), blocks=(len(kernels) - 6) // 2,
        upsample="deconv" if kernels[-3][0] > kernels[-3][1] else "nearest")
    try:
        G = GENERATORS[args.generator](args)
        G.load_state_dict(dict(zip(G.state_dict(), weights, strict=True)))
    except (RuntimeError, ValueError):
        die(f"{path}: its layers are not those of a {args.generator} generator")
    if any("down_blocks" in name for name in state):    # "Learn Generative AI with PyTorch" does so
        G.down1.padding_mode = G.down2.padding_mode = "reflect"
    return G

def demo(argv, args):
    """Draws toy faces, then runs the commands that it prints, with the flags typed after --demo."""
    from prepare_celeba import toy_faces
    toy_faces("files/toy", n=400, n_test=50)
    run = shlex.quote(args.out_dir or "runs/demo")
    commands = [
        "--dataA files/toy/black --dataB files/toy/blond --size 64 --load_size 68 --generator unet "
        "--ngf 16 --ndf 16 --batch_size 4 --lr 1e-3 --epochs 8 --epochs_decay 16 --amp off "
        f"--out_dir {run}",
        f"--checkpoint {run}/generators.pt --direction AtoB --input files/toy/black_test "
        f"--truth files/toy/blond_test --output {run}/blond --overwrite",
        f"--checkpoint {run}/generators.pt --direction BtoA --input files/toy/blond_test "
        f"--truth files/toy/black_test --output {run}/black --overwrite"]
    if os.path.exists(f"{args.out_dir or 'runs/demo'}/latest.pt"):
        commands[0] = f"--resume {run}"
    for command in commands:
        words = shlex.split(command) + [word for word in argv if word != "--demo"]
        print("\npython cyclegan.py", shlex.join(words), flush=True)
        status = main(words)
        if status:
            return status
    print(f"\nnow open the last grid in {run}/samples: rows 2 and 5 are translations")
    return 0

def main(argv):
    """Runs a command line, given as a list of words. Returns its exit status."""
    args = get_args(argv)
    if args.demo:
        return demo(argv, args)
    if args.mode == "translate":
        return translate(argv, args)
    if args.resume:
        return train(*resume(argv, args.resume))
    return train(args)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback
    status = main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()    # or torch can abort while the process ends
    sys.exit(status)
