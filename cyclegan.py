"""
CycleGAN in one file: learns to translate between two kinds of images from two unpaired folders
(Zhu, Park, Isola, Efros, ICCV 2017, arXiv:1703.10593; in the code, § and Eq. refer to this paper).

  python cyclegan.py --demo                                     # draws toy faces, trains on them
  python cyclegan.py --dataA files/black --dataB files/blond    # train; writes runs/black2blond
  python cyclegan.py --resume runs/black2blond                  # continue from the last checkpoint
  python cyclegan.py --checkpoint runs/black2blond/generators.pt --input photos --output out
  torchrun --nproc_per_node=8 cyclegan.py --dataA files/black --dataB files/blond --out_dir runs/8

Two generators translate, one in each direction; two discriminators tell real images from fakes.
No pairs are needed: an image that is translated and then translated back should be unchanged.

  real_A ──G_AB──> fake_B ──G_BA──> rec_A ≈ real_A
                     └──> D_B: real or fake?
  real_B ──G_BA──> fake_A ──G_AB──> rec_B ≈ real_B
                     └──> D_A: real or fake?    (paper: G_AB, G_BA, D_A, D_B = G, F, D_X, D_Y)

Where to edit: GENERATORS, GAN_LOSSES, generator_loss, train_step, and `generators` in train (EMA).
A gradient penalty also needs --no-compile: torch.compile cannot differentiate a gradient again.
"""
import argparse
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
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed as dist, nn
from torchvision import datasets, ops, transforms as T, utils

def die(message):
    """Ends the program with one line on stderr and exit status 2."""
    print(f"cyclegan.py: {message}", file=sys.stderr)
    if dist.is_initialized():
        os._exit(2)                     # a normal exit could hang, waiting for other processes
    sys.exit(2)

# ---- 1. Flags ------------------------------------------------------------------------------------
def get_args(argv=None, stored={}):
    """-> Namespace of all flags: argv beats `stored` (a checkpoint's), which beats the defaults."""
    parser = argparse.ArgumentParser(
        usage="python cyclegan.py [flags]", description=__doc__.partition("\nTwo generators")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = die
    group = parser.add_argument_group("run")
    def path(text):                             # absolute: a run can be resumed from anywhere
        return os.path.abspath(os.path.expanduser(text))
    def add(name, default, help, **kw):         # adds a flag to the current `group`
        if isinstance(default, bool):
            kw["action"] = argparse.BooleanOptionalAction
        else:
            kw["type"] = path if default is None else type(default)     # all None flags are paths
        group.add_argument(f"--{name}", default=default, help=f"{help} (default: {default})", **kw)
    add("mode", "train", "translate is implied by --checkpoint", choices=["train", "translate"])
    add("demo", False, "train on synthetic toy faces, print the error on unseen ones")
    add("out_dir", None, "folder of the run; None means runs/<A>2<B>")
    add("resume", None, "folder of a run to continue; needs no other flag")
    add("seed", 0, "seed for weights, order of data, augmentation and pools")
    add("device", "auto", "cuda, cuda:1, mps or cpu; auto: a GPU if there is one")
    group = parser.add_argument_group("data")
    add("dataA", None, "folders of A images, searched recursively", nargs="+")
    add("dataB", None, "folders of B images; the counts may differ", nargs="+")
    add("size", 256, "side of the training images, in pixels")
    add("load_size", 0, "resize to this (0: 1.12 x size), then crop at random to size")
    add("resize", "stretch", "crop keeps the aspect ratio", choices=["stretch", "crop"])
    add("flip", True, "mirror half of the images")
    add("workers", 4 if torch.cuda.is_available() else 0, "processes that load images")
    group = parser.add_argument_group("networks")
    add("generator", "resnet", "ResNet (the paper's) or U-Net", choices=GENERATORS)
    add("blocks", 0, "residual blocks; 0 means 9 if size >= 256, else 6")
    add("ngf", 64, "channels of a generator's first layer")
    add("ndf", 64, "channels of a discriminator's first layer")
    add("upsample", "deconv", "nearest: no checkerboard artifacts", choices=["deconv", "nearest"])
    group = parser.add_argument_group("objective")
    add("gan_loss", "lsgan", "least squares, cross-entropy, focal or GHM loss", choices=GAN_LOSSES)
    add("lambda_cycle", 10.0, "weight of cycle consistency")
    add("lambda_identity", 0.5, "weight of the identity term, relative to lambda_cycle")
    add("pool_size", 50, "past fakes kept to train each discriminator; 0: none")
    group = parser.add_argument_group("schedule")
    add("epochs", 100, "passes over the larger domain at a constant learning rate")
    add("epochs_decay", 100, "further epochs, in which the learning rate decays to 0")
    add("max_steps", 10**9, "stop at this step, whatever the schedule")
    add("batch_size", 1, "images of each domain per step and process")
    add("lr", 2e-4, "learning rate of Adam")
    add("beta1", 0.5, "first beta of Adam")
    group = parser.add_argument_group("speed")
    add("amp", "auto", "auto: bf16 if the hardware has it", choices=["auto", "bf16", "off"])
    add("compile", torch.cuda.is_available(), "compile the networks with torch.compile")
    group = parser.add_argument_group("output")
    add("log_every", 100, "steps between rows of the log")
    add("sample_every", 500, "steps between sample grids")
    add("save_every", 2000, "steps between checkpoints")
    group = parser.add_argument_group("translate")
    add("checkpoint", None, "generators.pt, or a generator from other CycleGAN code")
    add("input", None, "images, and folders of images", nargs="+")
    add("output", None, "output folder; PNGs keep the names and structure of the input")
    add("overwrite", False, "allow an existing --output, and replace its files")
    add("direction", "AtoB", "which generator to use", choices=["AtoB", "BtoA"])
    add("native", False, "translate at each image's own size instead of --size")
    add("round_trip", False, "also write NAME_back.png, translated there and back")
    add("truth", None, "folders of correct translations, same names; prints the error", nargs="+")
    defaults = vars(parser.parse_args([]))
    if stored and stored.keys() != defaults.keys():
        die(f"checkpoint of another version of cyclegan.py: {stored.keys() ^ defaults.keys()}")
    args = parser.parse_args(argv, argparse.Namespace(**stored))    # a stored value beats a default
    for name, value in vars(args).items():
        minimum = 1 if name in "ngf ndf batch_size log_every sample_every save_every".split() else 0
        if isinstance(value, (int, float)) and not value >= minimum:    # also true of nan
            die(f"--{name} {value} must be at least {minimum}")
    args.load_size = args.load_size or args.size * 286 // 256
    args.blocks = args.blocks or (9 if args.size >= 256 else 6)
    if args.dataA and args.dataB and not args.out_dir:
        A, B = Path(args.dataA[0]), Path(args.dataB[0])
        name = A.parent.name if A.name == "trainA" else f"{A.name}2{B.name}"    # x/trainA -> x
        args.out_dir = path(f"runs/{name}")
    return args

# ---- 2. Data -------------------------------------------------------------------------------------
# A "pair" here is an image of A and an unrelated one of B. They stay uint8 until on the device.
def find_images(tops, output):
    """Images, folders -> {path: relative name without suffix}. Refuses an `output` inside them."""
    images = {}
    for top in map(Path, tops):
        if Path(output).is_relative_to(top):
            die(f"{output} is in {top}: outputs would mix with inputs; choose another folder")
        files = [path for path in sorted(top.rglob("*"))            # neither folders nor hidden
                 if path.is_file() and "/." not in f"/{path.relative_to(top).as_posix()}"]
        found = [path for path in files if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
        if len(found) < len(files):
            print(f"{top}: skipped {len(files) - len(found)} files of other types")
        images |= {path: path.relative_to(top).with_suffix("") for path in found}
        if top.is_file():               # rglob found nothing in it
            images[top] = Path(top.stem)
        elif not found:
            die(f"no images in {top}; is it the right place?")
    return images

def read_image(path):
    """-> PIL RGB, EXIF-rotated; None, after a message, if the file is unreadable."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":               # 16 bits or more: of unknown range
            raise ValueError("convert it to 8 bits per channel")
        return image.convert("RGB")
    except Exception as error:          # decoders raise anything on broken files
        print(f"skipped {path}: {error}", file=sys.stderr)

def preprocess(image, args, augment=False):
    """PIL RGB -> (3, size, size) uint8; augment: random crop and flip. --native: keeps its size."""
    if args.native and not augment:
        return T.functional.pil_to_tensor(image)
    side = args.load_size if augment else args.size
    new_size = side if args.resize == "crop" else (side, side)      # an int: the shorter side
    image = T.Resize(new_size, T.InterpolationMode.BICUBIC)(image)
    crop = T.RandomCrop if augment else T.CenterCrop
    image = T.functional.pil_to_tensor(crop(args.size)(image))
    return T.RandomHorizontalFlip(0.5 if augment and args.flip else 0.0)(image)

def seed_torch(*key):
    """Seeds torch: the same key, such as (seed, step, rank), gives the same random numbers."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))

class UnpairedImages:
    """Item n: the n-th pair since step 0, over all epochs. Depends on (seed, n) only."""
    def __init__(self, args):
        if None in (args.dataA, args.dataB):
            die("training needs --dataA and --dataB; see --help, or try --demo")
        if set(args.dataA) & set(args.dataB):
            die("the same folder is in --dataA and in --dataB")
        self.args = args
        self.paths_A = list(find_images(args.dataA, args.out_dir))
        self.paths_B = list(find_images(args.dataB, args.out_dir))

    def __getitem__(self, n):
        return self.load_item(self.paths_A, n, "A"), self.load_item(self.paths_B, n, "B")

    def load_item(self, paths, n, domain):
        for k in range(n, n + 100):             # k = n, unless that file cannot be read
            lap, i = divmod(k, len(paths))      # each lap shows all images, in a new order
            rng = np.random.default_rng((self.args.seed, lap, ord(domain)))
            path = paths[rng.permutation(len(paths))[i]]    # recomputed per item: no state to save
            image = read_image(path)
            if image is not None:
                seed_torch(self.args.seed, n, domain)
                return preprocess(image, self.args, augment=True)
        die(f"too many unreadable images near {path}")

def ignore_signals(_):
    """For loader processes: the main process decides when to stop and needs data until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def load_batches(data, start_step, total_steps, runtime):
    """Yields step, real_A, real_B: (N, 3, size, size) in [-1, 1]. For runtime, see section 8."""
    items = range(start_step * runtime.pairs_per_step, total_steps * runtime.pairs_per_step)
    loader = torch.utils.data.DataLoader(       # process r takes items r, r + world_size, ...
        data, data.args.batch_size, sampler=items[runtime.rank::runtime.world_size],
        num_workers=data.args.workers, worker_init_fn=ignore_signals, pin_memory=runtime.is_cuda)
    for step, batch in enumerate(loader, start_step + 1):
        yield step, *map(runtime.to_float, batch)

# ---- 3. Generators -------------------------------------------------------------------------------
# (N, 3, H, W) in [-1, 1] -> same, fully convolutional. As in the paper: reflection padding at
# stride 1 (zeros would show as a border), instance norm (ignores contrast), tanh (for [-1, 1]).
class InstanceNorm(nn.Module):
    """A group norm with one channel per group: mean 0, variance 1. (N, C, H, W) -> same."""
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # autocast would use float32: slow
            return F.group_norm(x, x.shape[1])  # not F.instance_norm: its CPU gradients are wrong

def upsample(n_in, n_out, args, kernel_size=3):
    """(N, n_in, H, W) -> (N, n_out, 2H, 2W), by a transposed convolution in the paper (§7.2)."""
    if args.upsample == "nearest":      # no checkerboard artifacts: Odena et al. 2016
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(n_in, n_out, 3, padding=1))
    return nn.ConvTranspose2d(n_in, n_out, kernel_size, stride=2, padding=1,
                              output_padding=kernel_size % 2)       # doubles the size exactly

class CompilableSequential(nn.Sequential):
    """Has a forward of its own: torch up to 2.11 does not compile that of nn.Sequential."""
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

class ResNetGenerator(CompilableSequential):
    """The paper's generator (§7.2): 11,378,179 parameters with 9 blocks, 7,837,699 with 6."""
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
        self.size_multiple = 4                  # what H and W must be divisible by

class UNetGenerator(nn.Module):
    """The U-Net of pix2pix, 54,409,603 parameters at 256 pixels. --size decides how deep it is."""
    def __init__(self, args):
        super().__init__()
        n_levels = max(k for k in range(9) if args.size % 2**k == 0)        # 256 -> 8, 96 -> 5
        if n_levels < 5:
            die("with --generator unet, --size must be a multiple of 32")
        self.size_multiple = 2**n_levels
        self.norm = InstanceNorm()
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        widths = [args.ngf * min(2**k, 8) for k in range(n_levels)]         # 64, 128, 256, 512 ...
        n_in = 3
        for n_out in widths:
            self.downs.append(nn.Conv2d(n_in, n_out, 4, stride=2, padding=1))
            n_in = n_out
        for n_out in [*widths[-2::-1], 3]:      # 512 ... 128, 64, 3; n_in starts at widths[-1]
            self.ups.append(upsample(n_in, n_out, args, kernel_size=4))
            n_in = 2 * n_out                    # the next one gets n_out more by its skip

    def forward(self, x):                                           # (N, 3,    H,   W)
        skips = [self.downs[0](x)]                                  # (N, 64,   H/2, W/2)
        for down in self.downs[1:-1]:
            skips.append(self.norm(down(F.leaky_relu(skips[-1], 0.2))))     # (N, 128, H/4, W/4) ...
        x = self.downs[-1](F.leaky_relu(skips[-1], 0.2))            # a norm would zero 1x1 maps
        for up in self.ups[:-1]:
            x = torch.cat([skips.pop(), self.norm(up(x.relu()))], dim=1)    # ... (N, 128, H/2, W/2)
        return self.ups[-1](x.relu()).tanh()                        # (N, 3,    H,   W)

GENERATORS = {"resnet": ResNetGenerator, "unet": UNetGenerator}

# ---- 4. Discriminator ----------------------------------------------------------------------------
# One score per 70x70 patch (§4) is enough: it checks texture and color; the cycle keeps the layout.
# Why 70: n outputs of a 4x4 conv see (n-1)*stride + 4 inputs. Last layer first: 4, 7, 16, 34, 70.
class PatchDiscriminator(CompilableSequential):
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
def query_pool(pool, size, fakes):
    """(N, 3, H, W), detached -> same. Once the pool is full, exchanges half of them for older."""
    result = []
    for fake in fakes:
        if len(pool) < size:
            pool.append(fake.clone())       # a view would keep its whole batch in memory
        elif size > 0 and torch.rand(()) < 0.5:
            k = int(torch.randint(size, ()))
            fake, pool[k] = pool[k].to(fake), fake.clone()      # swap; a loaded pool is on the CPU
        result.append(fake)
    return torch.stack(result)

# ---- 6. Objective --------------------------------------------------------------------------------
# Three terms for the generators. Adversarial (Eq. 1): the output looks like the other domain; alone
# it would allow the same output for all inputs (collapse). Cycle (Eq. 2): translating back recovers
# the input; alone it would allow any reversible change, such as inverted colors. Identity (§5.2):
# G_AB leaves a real B as it is. Without it colors may shift; with a large weight G copies inputs.
# In the log of a healthy lsgan run, D_A and D_B are 0.1 to 0.25 (0.25: guessing), adv_AB and adv_BA
# 0.3 to 0.6, and the others fall. D near 0 and adv near 1: D has won, or G copies its input.
bce = F.binary_cross_entropy_with_logits

def ghm(scores, targets):
    """GHM-C (Li et al. 2019, Eq. 7): bins scores by |gradient|; each non-empty bin counts alike."""
    entropy = bce(scores, targets, reduction="none").flatten()
    gradient = (scores.detach().sigmoid() - targets).abs().flatten()        # d entropy / d score
    bins = (gradient * 10).long().clamp(0, 9)
    n_in_bin = F.one_hot(bins, 10).sum(0)       # unlike bincount, does not wait for the GPU
    return (entropy / n_in_bin[bins]).sum() / n_in_bin.count_nonzero()

GAN_LOSSES = {                          # (loss of D, loss of G), each called on (scores, targets)
    "lsgan": (F.mse_loss, F.mse_loss),  # §4, Mao et al. 2017: has a gradient even where D is sure
    "bce": (bce, bce),                  # cross-entropy: Eq. 1, with the non-saturating loss for G
    "focal": (partial(ops.sigmoid_focal_loss, alpha=-1, reduction="mean"), bce),    # -1: unweighted
    "ghm": (ghm, bce)}                  # focal, ghm: weight patches by difficulty, for D only

class CycleGAN(nn.Module):
    """Two generators, two discriminators, and what each pair minimizes."""
    def __init__(self, args):
        super().__init__()
        if args.size % 4 or not 32 <= args.size <= args.load_size:
            die("--size must be a multiple of 4, from 32 to --load_size")
        torch.manual_seed(args.seed)    # the same initial weights in every process
        Generator = GENERATORS[args.generator]
        self.G_AB, self.G_BA = Generator(args), Generator(args)
        self.D_A, self.D_B = PatchDiscriminator(args), PatchDiscriminator(args)
        self.networks = {"G_AB": self.G_AB, "G_BA": self.G_BA, "D_A": self.D_A, "D_B": self.D_B}
        for network in self.networks.values():      # pretrained weights: load them after this loop
            network.apply(init_weights)
            if args.compile:
                network.compile(dynamic=False)      # in place; recompiles for each shape
        self.d_loss, self.g_loss = GAN_LOSSES[args.gan_loss]
        self.lambda_cycle = args.lambda_cycle
        self.lambda_identity = args.lambda_cycle * args.lambda_identity     # from here on absolute

    def generator_loss(self, real_A, real_B):
        """Eq. 3 plus the identity term -> loss, its weighted terms, fake_A, fake_B (detached)."""
        terms = {}
        if self.lambda_identity > 0:    # one pass for both: instance norm never mixes images
            fake_B, idt_B = self.G_AB(torch.cat([real_A, real_B])).chunk(2)
            fake_A, idt_A = self.G_BA(torch.cat([real_B, real_A])).chunk(2)
            terms["idt_A"] = self.lambda_identity * F.l1_loss(idt_A, real_A)
            terms["idt_B"] = self.lambda_identity * F.l1_loss(idt_B, real_B)
        else:
            fake_B = self.G_AB(real_A)
            fake_A = self.G_BA(real_B)
        rec_A = self.G_BA(fake_B)
        rec_B = self.G_AB(fake_A)
        terms["cycle_A"] = self.lambda_cycle * F.l1_loss(rec_A, real_A)
        terms["cycle_B"] = self.lambda_cycle * F.l1_loss(rec_B, real_B)
        score_A, score_B = self.D_A(fake_A), self.D_B(fake_B)
        terms["adv_AB"] = self.g_loss(score_B, torch.ones_like(score_B))
        terms["adv_BA"] = self.g_loss(score_A, torch.ones_like(score_A))
        return sum(terms.values()), terms, fake_A.detach(), fake_B.detach()

    def discriminator_loss(self, real_A, real_B, fake_A, fake_B):
        """Real images should score 1, fakes 0. Halved (§7.1). -> loss, terms (name: scalar)."""
        score_real_A, score_fake_A = self.D_A(torch.cat([real_A, fake_A])).chunk(2)
        score_real_B, score_fake_B = self.D_B(torch.cat([real_B, fake_B])).chunk(2)
        ones, zeros = torch.ones_like(score_real_A), torch.zeros_like(score_fake_A)
        loss_A = 0.5 * (self.d_loss(score_real_A, ones) + self.d_loss(score_fake_A, zeros))
        loss_B = 0.5 * (self.d_loss(score_real_B, ones) + self.d_loss(score_fake_B, zeros))
        return loss_A + loss_B, {"D_A": loss_A, "D_B": loss_B}

# ---- 7. One step ---------------------------------------------------------------------------------
def train_step(model, optimizers, pools, runtime, real_A, real_B, step):
    """Updates the generators, then the discriminators. Images (N, 3, H, W) in [-1, 1] -> terms."""
    seed_torch(runtime.args.seed, step, runtime.rank)   # the pools draw the same when resumed
    model.D_A.requires_grad_(False)     # G's gradient passes through D, but D's own is not needed
    model.D_B.requires_grad_(False)
    with runtime.autocast():
        loss, terms_G, fake_A, fake_B = model.generator_loss(real_A, real_B)
    loss.backward()
    runtime.step(optimizers["optimizer_G"])     # updates the generators, frees the gradients

    model.D_A.requires_grad_(True)
    model.D_B.requires_grad_(True)
    fake_A = query_pool(pools["A"], runtime.args.pool_size, fake_A)     # detached: no gradient to G
    fake_B = query_pool(pools["B"], runtime.args.pool_size, fake_B)
    with runtime.autocast():
        loss, terms_D = model.discriminator_loss(real_A, real_B, fake_A, fake_B)
    loss.backward()
    runtime.step(optimizers["optimizer_D"])
    return {name: term.detach() for name, term in (terms_G | terms_D).items()}

# ---- 8. Runtime ----------------------------------------------------------------------------------
class Runtime:
    """Device, precision, processes. Skip on first reading: nothing here changes the mathematics.
    Gradients are averaged by hand: DistributedDataParallel expects one forward per backward."""
    def __init__(self, args):
        self.args = args
        self.rank = int(os.environ.get("RANK", 0))      # of this process; set by torchrun
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.pairs_per_step = args.batch_size * self.world_size
        name = "cpu" if args.device == "auto" else args.device
        if args.device == "auto" and torch.accelerator.is_available():
            name = torch.accelerator.current_accelerator().type
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.zeros(1, device=name).device
        except Exception:               # each kind of device raises its own
            die(f"--device {name} is not available; try --device cpu")
        self.is_cuda = self.device.type == "cuda"
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True       # tries all algorithms once per size
        cpu_ok = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()     # private
        gpu_ok = self.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        use_bf16 = args.amp == "bf16" or args.amp == "auto" and (gpu_ok if self.is_cuda else cpu_ok)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=use_bf16)
        if self.world_size > 1 and not dist.is_initialized():   # --demo calls main three times
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.is_cuda else "gloo")

    def to_float(self, images):         # uint8 -> [-1, 1], on the device
        return images.to(self.device, non_blocking=True).float() / 127.5 - 1

    def step(self, optimizer):          # averages gradients over processes, updates, clears them
        if self.world_size > 1:
            gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
            flat = nn.utils.parameters_to_vector(gradients)     # one sum is faster than many
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat / self.world_size, gradients)    # overwrites p.grad
        optimizer.step()
        optimizer.zero_grad()

    def mean(self, numbers):            # of each number over all processes
        total = torch.tensor(numbers, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)              # on the CPU, by gloo
        return (total / self.world_size).tolist()

# ---- 9. Outputs ----------------------------------------------------------------------------------
write_png = partial(utils.save_image, format="png", nrow=6, normalize=True, value_range=(-1, 1))

def write_file(path, write, content):
    """Calls write(content, file) on a temporary file, then renames it: a crash keeps the old."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(content, f"{path}.part")
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:       # torch.save raises the latter
        die(f"cannot write {path} ({error}); is the disk full?")

def progress(start_time, done, total):
    """On a terminal, after five steps (the first are slow), a live line with the time left."""
    if done >= 5 and sys.stdout.isatty():
        hours = (time.time() - start_time) * (total / done - 1) / 3600
        print(f"{done}/{total}, {hours:.2f} hours left", end="\033[K\r", flush=True)

@torch.no_grad()
def save_samples(step, generators, runtime, data):
    """Writes a grid of the first six items. Rows: real A, fake B, rec A, real B, fake A, rec B."""
    batch = torch.utils.data.default_collate([data[n] for n in range(6)])
    real_A, real_B = map(runtime.to_float, batch)
    G_AB, G_BA = [G.forward for G in generators.values()]   # not compiled: N = 6 would recompile
    with runtime.autocast():
        fake_B, fake_A = G_AB(real_A), G_BA(real_B)
        grid = [real_A, fake_B, G_BA(fake_B), real_B, fake_A, G_AB(fake_A)]
    write_file(f"{data.args.out_dir}/samples/step_{step:07}.png", write_png, torch.cat(grid))

def write_log(path, rows):
    """Writes log.csv and prints the last row. If the file is locked, it is written later."""
    try:
        with open(path, "w", newline="") as file:
            names = dict.fromkeys(name for row in rows for name in row)     # an ordered set
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        print(f"cannot write {path} ({error.strerror}); trying again with the next row")
    if len(rows) % 10 == 1:
        print(*[f"{name:>7}" for name in rows[-1]])
    step, *values = rows[-1].values()
    print(f"{step:7}", *[f"{value:7.3g}" for value in values], flush=True)

def save_checkpoint(args, generators, parts, **extra):
    """Writes latest.pt (to resume: also `parts`, `extra`) and generators.pt (to translate)."""
    shared = {"flags": vars(args),
              "generators": {name: G.state_dict() for name, G in generators.items()}}
    states = {name: part.state_dict() for name, part in parts.items()}
    write_file(f"{args.out_dir}/latest.pt", torch.save, shared | {"parts": states} | extra)
    write_file(f"{args.out_dir}/generators.pt", torch.save, shared)

def load_checkpoint(path):
    """-> the dict in a checkpoint, its tensors on the CPU."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:                   # torch.load raises anything on a broken file
        die(f"{path} is missing, truncated, or not a checkpoint")

# ---- 10. Train -----------------------------------------------------------------------------------
stop_signals = []       # received so far; train and translate check it

def lr_at(epoch, args):
    """The learning rate at a (fractional) epoch: constant, then linear to 0 (§7.1)."""
    return args.lr * min(1, 1 - (epoch - args.epochs) / max(args.epochs_decay, 1))

def make_optimizers(model, args):
    """-> Adam (§7.1) for the generators and for the discriminators."""
    G = [*model.G_AB.parameters(), *model.G_BA.parameters()]
    D = [*model.D_A.parameters(), *model.D_B.parameters()]
    trainable = {p for p in model.parameters() if p.requires_grad}
    assert trainable <= {*G, *D}, "an added module is trainable, but in no optimizer; freeze it?"
    adam = partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, 0.999), fused=True)
    return {"optimizer_G": adam(G), "optimizer_D": adam(D)}

def request_stop(number, _):
    """Signal handler (where print is unsafe). A second Ctrl-C ends the program at once."""
    stop_signals.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.write(2, b"\nfinishing this step, then saving; press Ctrl-C again to stop without saving\n")

def train(args, checkpoint=None):
    """Trains from scratch or continues from a checkpoint; writes into args.out_dir."""
    runtime, data = Runtime(args), UnpairedImages(args)
    model = CycleGAN(args).to(runtime.device)
    optimizers = make_optimizers(model, args)
    generators = {"G_AB": model.G_AB, "G_BA": model.G_BA}   # to sample and export; EMA: copies here
    parts = model.networks | optimizers     # saved, resumed; EMA: | {"ema_AB": copy, ...}
    pools, rows, start_step = {"A": [], "B": []}, [], 0
    n_images = [len(data.paths_A), len(data.paths_B)]
    steps_per_epoch = math.ceil(max(n_images) / runtime.pairs_per_step)
    total_steps = min((args.epochs + args.epochs_decay) * steps_per_epoch, args.max_steps)
    if checkpoint is None:
        make_out_dir(args, model)
    else:                                   # restore fills parts and pools, and returns the log
        start_step = checkpoint["pairs_seen"] // runtime.pairs_per_step  # batch size may be new
        rows = restore(args, checkpoint, parts, pools, n_images, total_steps - start_step)
    if runtime.mean(n_images) != n_images:      # not the same in all processes
        die(f"this process found {n_images} images of A and B, others found more or fewer")
    if runtime.rank == 0:
        epoch = start_step / steps_per_epoch
        print(f"{args.out_dir}: {n_images} images of [A, B], on {runtime.device}; {args.epochs} "
              f"epochs at lr {args.lr}, then {args.epochs_decay} down to 0; starting at epoch "
              f"{epoch:.2f}, lr {lr_at(epoch, args):.2g}; {total_steps - start_step} steps to go")

    start_time = row_time = ready_time = time.time()
    sums = Counter()                    # since the last row of the log; Counter.update() adds
    for step, real_A, real_B in load_batches(data, start_step, total_steps, runtime):
        sums.update(steps=1, waiting=time.time() - ready_time)      # seconds spent waiting for data
        lr = lr_at((step - 1) / steps_per_epoch, args)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
        terms = train_step(model, optimizers, pools, runtime, real_A, real_B, step)
        sums.update(terms)

        is_stopping = runtime.mean([len(stop_signals)])[0] > 0          # a signal in any process
        is_last = is_stopping or step == total_steps
        is_saving = is_last or step % args.save_every == 0
        is_logging = is_saving or step % args.log_every == 0
        if is_logging:              # also before every save: broken weights are never saved
            if not all(p.isfinite().all() for p in model.parameters()):
                die(f"step {step}: weights not finite; --resume with --amp off or a lower --lr")
            n_steps = sums.pop("steps")
            means = runtime.mean([float(total) / n_steps for total in sums.values()])
            rows.append({"step": step, "epoch": step / steps_per_epoch, "lr": lr,
                         **dict(zip(sums, means)),
                         "img/s": 2 * n_steps * runtime.pairs_per_step / (time.time() - row_time)})
            sums, row_time = Counter(), time.time()
        if runtime.rank == 0:
            if is_saving:
                save_checkpoint(args, generators, parts, pools=pools, rows=rows, n_images=n_images,
                                pairs_seen=step * runtime.pairs_per_step)
            if is_logging:
                write_log(f"{args.out_dir}/log.csv", rows)
            if is_last or step % args.sample_every == 0:
                save_samples(step, generators, runtime, data)
            progress(start_time, step - start_step, total_steps - start_step)
        if is_stopping:
            break
        ready_time = time.time()
    if runtime.rank == 0:
        print(f"see {args.out_dir}/samples; to continue (if done, raise --epochs, --max_steps):\n"
              f"python cyclegan.py --resume {shlex.quote(args.out_dir)}")

def make_out_dir(args, model):
    """Makes the folder of a new run. Refuses an existing run, or a full disk; warns of a CPU."""
    if args.size >= 256 and not torch.accelerator.is_available():
        print("without a GPU this takes days: try --size 64, or --demo")
    if os.path.exists(f"{args.out_dir}/latest.pt"):
        die(f"{args.out_dir} holds a run: --resume it, or choose another --out_dir")
    n_floats = 4 * sum(p.numel() for p in model.parameters())   # weights, 2 moments, generators.pt
    n_floats += 2 * args.pool_size * 3 * args.size**2           # two pools of RGB images
    n_bytes = 2 * 4 * n_floats                  # float32; old files stay until new ones are there
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        if shutil.disk_usage(args.out_dir).free < n_bytes:
            die(f"disk full: {args.out_dir} needs {n_bytes / 1e9:.1f} GB for its checkpoints")
    except OSError as error:
        die(f"--out_dir: {error}")

def restore(args, checkpoint, parts, pools, n_images, n_steps_left):
    """Fills parts, pools -> log. Dies if a fixed flag changed, or any flag of a finished run."""
    fixed = "generator blocks ngf ndf upsample size beta1 seed out_dir".split()  # Adam loads beta1
    for name, value in checkpoint["flags"].items():
        if getattr(args, name) != value and (name in fixed or n_steps_left <= 0):
            die(f"--{name} was {value}: fixed, or the run is finished; choose another --out_dir")
    try:
        for name in {*checkpoint["parts"], *parts}:         # a name in only one: KeyError
            parts[name].load_state_dict(checkpoint["parts"][name])
        pools.update(checkpoint["pools"])
    except (KeyError, RuntimeError, ValueError):
        die(f"{args.out_dir}: latest.pt is from another version of cyclegan.py")
    if checkpoint["n_images"] != n_images:
        print(f"the run had {checkpoint['n_images']} images: it does not continue identically")
    return checkpoint["rows"]

# ---- 11. Translate -------------------------------------------------------------------------------
def load_generators(path, argv=()):
    """-> {"G_AB": network, "G_BA": network} on the CPU, and all flags. In a notebook, omit argv."""
    checkpoint = load_checkpoint(path)
    args = get_args(argv, checkpoint.get("flags", {}))      # argv, else run's flags, else defaults
    generators = {}
    try:
        if "generators" not in checkpoint:      # other code's: match weights by order, not by name
            weights = [w for key, w in checkpoint.items() if str(key).endswith(("weight", "bias"))]
            own = GENERATORS[args.generator](args).state_dict()
            checkpoint["generators"] = {"G_AB": dict(zip(own, weights, strict=True))}
        for name, state in checkpoint["generators"].items():
            generators[name] = GENERATORS[args.generator](args)
            generators[name].load_state_dict(state)
    except (KeyError, RuntimeError, ValueError):
        die(f"{path} does not fit --generator, --blocks, --ngf, --size and --upsample")
    return generators, args

def translate_any(G, x):
    """G for (1, 3, H, W) of any size: pads to the multiple it needs, then crops."""
    h, w = x.shape[-2:]
    x = F.pad(x, (0, -w % G.size_multiple, 0, -h % G.size_multiple), mode="replicate")
    return G(x)[..., :h, :w]

def compare(x, y, truth):
    """-> where truth differs from x: mean error of y, then of x; elsewhere: mean error of y."""
    error_x, error_y = [(image - truth).abs().mean(dim=1) for image in (x, y)]      # (1, H, W)
    changed = error_x > 0           # exactly: meant for synthetic images such as the toy faces
    return error_y[changed].mean(), error_x[changed].mean(), error_y[~changed].mean()

@torch.no_grad()
def translate(args, generators):
    """Translates --input into --output. Returns the exit status: 1 if an image was unreadable."""
    runtime = Runtime(args)
    networks = [G.to(runtime.device) for G in generators.values()]
    if args.round_trip and len(networks) == 1:
        die("--round_trip needs both generators")
    if args.direction == "BtoA":
        networks.reverse()
    if os.path.exists(args.output) and not args.overwrite:
        die(f"{args.output} exists: choose another --output, or --overwrite")
    images = find_images(args.input, args.output)
    if len(set(images.values())) < len(images):
        die("two images in --input would get the same name in --output")
    truths = {name: path for path, name in find_images(args.truth or [], args.output).items()}

    n_translated, errors = 0, []
    for path, name in images.items():
        if stop_signals:
            break
        image = read_image(path)
        if image is None:
            continue
        x = runtime.to_float(preprocess(image, args))[None]
        y = translate_any(networks[0], x)
        write_file(f"{args.output}/{name}.png", write_png, y)       # a grid of one image: no border
        if args.round_trip:
            write_file(f"{args.output}/{name}_back.png", write_png, translate_any(networks[1], y))
        truth = read_image(truths[name]) if name in truths else None
        if truth is not None:
            errors.append(compare(x, y, runtime.to_float(preprocess(truth, args))))
        n_translated += 1
    print(f"translated {n_translated} of {len(images)} images into {args.output}")
    if errors:
        after, before, elsewhere = torch.tensor(errors).T       # nan: mean of no pixels
        share = (after / before).nanmean()
        print(f"inside the changed region: error {after.nanmean():.3f} ({share:.1%} of leaving it "
              f"unchanged); elsewhere: error {elsewhere.nanmean():.3f} (images in [-1, 1])")
    return n_translated < len(images)

# ---- 12. Main ------------------------------------------------------------------------------------
DEMO = ["--dataA files/toy/black --dataB files/toy/blond --size 64 --load_size 68 --generator unet "
            "--ngf 16 --ndf 16 --batch_size 4 --lr 1e-3 --epochs 8 --epochs_decay 16 --amp off "
            "--no-compile --out_dir {run}",                                     # 1. train
        "--checkpoint {run}/generators.pt --direction AtoB --input files/toy/black_test "
            "--truth files/toy/blond_test --output {run}/blond --overwrite",    # 2. A to B
        "--checkpoint {run}/generators.pt --direction BtoA --input files/toy/blond_test "
            "--truth files/toy/black_test --output {run}/black --overwrite"]    # 3. B to A

def demo(argv, args):
    """Draws toy faces, then runs the three commands of DEMO, each followed by your other flags."""
    from prepare_celeba import toy_faces        # a second script, needed only for --demo
    toy_faces("files/toy", n=400, n_test=50)
    run = args.out_dir or "runs/demo"
    commands = [command.format(run=shlex.quote(run)) for command in DEMO]
    if os.path.exists(f"{run}/latest.pt"):
        commands[0] = f"--resume {shlex.quote(run)}"        # instead of training from scratch
    for command in commands:
        words = shlex.split(command) + [word for word in argv if word != "--demo"]
        print("\npython cyclegan.py", shlex.join(words))
        if main(words):
            return 1
    print(f"\nnow open the last grid in {run}/samples: rows 2 and 5 are translations")
    return 0

def main(argv):
    """Runs a command line, given as a list of words. Returns its exit status."""
    args, checkpoint = get_args(argv), None
    if args.demo:
        return demo(argv, args)
    if args.mode == "translate" or args.checkpoint:
        if None in (args.checkpoint, args.input, args.output):
            die("translating needs --checkpoint, --input and --output")
        generators, args = load_generators(args.checkpoint, argv)
        return translate(args, generators)
    if args.resume:
        checkpoint = load_checkpoint(f"{args.resume}/latest.pt")
        here = {"out_dir": args.resume, "resume": args.resume}      # the folder may have moved;
        checkpoint["flags"] = checkpoint.get("flags", {}) | here    # restore compares these to args
        args = get_args(argv, checkpoint["flags"])      # the run's flags, overridden by argv
    train(args, checkpoint)
    return 128 + stop_signals[0] if stop_signals else 0      # 128 + signal: the shell's convention

if __name__ == "__main__":
    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    status = main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()    # otherwise torch may abort at exit
    sys.exit(status)
