"""
CycleGAN: turn pictures of one kind into pictures of another, learned from two folders without any pairs.
Zhu, Park, Isola, Efros: "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks",
ICCV 2017, arXiv 1703.10593. In comments, § and Eq. refer to it; "official code" is the authors' PyTorch code.

Two generators translate; two discriminators tell real pictures from translated ones. Nobody says which A goes
with which B. What ties a translation to its source is the way back, which must end where it began:

  real_A ──G_AB──> fake_B ──G_BA──> rec_A ≈ real_A      real_B ──G_BA──> fake_A ──G_AB──> rec_B ≈ real_B
                     └──> D_B: a real B?                                   └──> D_A: a real A?

  python cyclegan.py --demo                                     no data, no GPU, a few minutes: see it work
  python cyclegan.py --dataA files/black --dataB files/blond    train; writes runs/black2blond
  python cyclegan.py --resume runs/black2blond                  go on where it stopped (on a CPU: bit for bit)
  python cyclegan.py --mode translate --checkpoint runs/black2blond/generators.pt --input photos --output out
  torchrun --standalone --nproc_per_node=8 cyclegan.py --dataA files/black --dataB files/blond

Names. The suffix is the domain of the picture: fake_B passes for a B, idt_A is G_BA(real_A), D_A judges A's.
  here     G_AB   G_BA   D_A   D_B   real_A   real_B   fake_B   fake_A   rec_A      rec_B
  paper    G      F      D_X   D_Y   x        y        G(x)     F(y)     F(G(x))    G(F(y))
What to change where. A generator: a class with its `multiple`, a line in GENERATORS. A GAN loss: a line in
GAN_LOSSES. A term: a line in CycleGAN.generator_loss; the log follows. Augmentation: fit. Schedule: lr_at.
"""
import argparse, datetime, functools, os, shlex, signal, sys, time, traceback, zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.utils import save_image

warn = lambda *words: print(*words, file=sys.stderr, flush=True)
def die(message):
    """Bad input ends here: one line that names the file or flag and says what to do, exit status 2."""
    if int(os.environ.get("RANK") or 0):      # most often process 0 says the same and torchrun ends this one;
        signal.signal(signal.SIGTERM, signal.SIG_DFL), time.sleep(3)        # if it still runs then, it speaks
    warn("cyclegan.py:", " ".join(str(message).split()))
    dist.is_initialized() and os._exit(2)   # an orderly end would wait for the other processes
    sys.exit(2)

# ---- 1. Flags ----------------------------------------------------------------------------------------------
def within(kind, low, high):
    """An argparse type: an int or a float from `low` to `high`."""
    def number(text):
        if low <= (value := kind(text)) <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
    return number

def get_args(argv=None):
    """-> Namespace of all there is to set; its `given`, a dict: what was typed, which a resumed run obeys."""
    parser = argparse.ArgumentParser("cyclegan.py", description=__doc__.split("\n")[1], allow_abbrev=False)
    add, parser.error = parser.add_argument, die
    add("--mode", choices=["train", "translate"], default="train", help="(train)")
    add("--demo", action="store_true", help="draw toy faces, train small, translate, measure the error")
    add("--out_dir", metavar="DIR", type=lambda x: x and os.path.normpath(x), help="of the run (runs/A2B)")
    add("--resume", metavar="RUN", help="folder or latest.pt of a run to go on with; needs no other flag")
    add("--seed", type=within(int, 0, 2**31), default=0, help="of weights, order, augmentation and pool (0)")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu (auto: the first of these that there is)")
    add("--dataA", nargs="+", metavar="DIR", help="folders with A-pictures, searched recursively")
    add("--dataB", nargs="+", metavar="DIR", help="folders with B-pictures; need not be as many")
    add("--load_size", type=within(int, 32, 9216), help="resize to this, then crop (286/256 of --size)")
    add("--size", type=within(int, 32, 8192), default=256, help="pixels a side for the networks (256)")
    add("--resize", choices=["stretch", "crop"], default="stretch", help="crop keeps the aspect (stretch)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half the pictures (on)")
    add("--workers", type=within(int, 0, 256), help="loading processes (0 on a CPU, up to 8 for each GPU)")
    add("--generator", choices=GENERATORS, default="resnet", help="unet copies outlines readily (resnet)")
    add("--blocks", type=within(int, 0, 64), help="residual blocks (9 from 256 pixels up, else 6)")
    add("--ngf", type=within(int, 1, 1024), default=64, help="channels in a generator's first layer (64)")
    add("--ndf", type=within(int, 1, 1024), default=64, help="channels in a discriminator's first layer (64)")
    add("--upsample", choices=["deconv", "nearest"], default="deconv", help="nearest: no checkers (deconv)")
    add("--gan_loss", choices=GAN_LOSSES, default="lsgan", help="(lsgan)")
    add("--lambda_cycle", type=within(float, 0, 1e6), default=10.0, help="more: changes less (10)")
    add("--lambda_identity", type=within(float, 0, 1e6), default=0.5, help="x the above; for colours (0.5)")
    add("--pool_size", type=within(int, 0, 10**5), default=50, help="old fakes to train D with; 0: off (50)")
    add("--epochs", type=within(int, 0, 10**6), default=100, help="at constant rate (100)")
    add("--epochs_decay", type=within(int, 0, 10**6), default=100, help="then linearly to rate 0 (100)")
    add("--max_steps", type=within(int, 1, 10**12), help="end here if the epochs do not end before (no cap)")
    add("--batch_size", type=within(int, 1, 65536), default=1, help="pairs a step, in each process (1)")
    add("--lr", type=within(float, 0, 10), default=2e-4, help="Adam's rate, used as given (2e-4)")
    add("--beta1", type=within(float, 0, 0.9999), default=0.5, help="Adam's first momentum (0.5)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="(auto: bf16 where native)")
    add("--compile", choices=["auto", "on", "off"], default="auto", help="(auto: on CUDA from 2000 steps)")
    add("--log_every", type=within(int, 1, 10**9), default=100, help="steps (100)")
    add("--sample_every", type=within(int, 1, 10**9), default=500, help="steps (500)")
    add("--save_every", type=within(int, 1, 10**9), default=5000, help="steps; every epoch, too (5000)")
    add("--tensorboard", action="store_true", help="log there, too (pip install tensorboard)")
    add("--checkpoint", metavar="FILE", help="generators.pt, or a bare generator from other CycleGAN code")
    add("--input", nargs="+", metavar="PATH", help="pictures, and folders of pictures, to translate")
    add("--output", metavar="DIR", help="where to: the same tree, the same names, .png")
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB", help="(AtoB)")
    add("--native", action="store_true", help="at each picture's own size instead of --size")
    add("--round_trip", action="store_true", help="write NAME_back.png as well: there and back again")
    add("--truth", metavar="DIR", help="the right answers, under the same names: prints the error")
    args = parser.parse_args(argv)
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))    # None: not typed
    args.given = {name: value for name, value in vars(typed).items() if value is not None}
    args.blocks = args.blocks if args.blocks is not None else 9 if args.size >= 256 else 6
    args.load_size = args.load_size or args.size * 286 // 256
    to_train = [] if args.demo or args.resume else ["dataA", "dataB"]
    for name in ["checkpoint", "input", "output"] if args.mode == "translate" else to_train:
        getattr(args, name) or die(f"--{name} is needed to {args.mode}; see --help, or try --demo")
    args.epochs + args.epochs_decay or die("--epochs and --epochs_decay are both 0")
    return args

# ---- 2. Data -----------------------------------------------------------------------------------------------
# Two folders and no pairs: a step takes one A and one B that have nothing to do with each other. Pictures
# travel as uint8; on the device they become floats in [-1, 1], the range of the generators' tanh.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
def find_images(top):
    """Sorted names of the pictures in a folder and below, none hidden or of a run. Exits without any."""
    os.path.isdir(top) or die(f"no folder {top}")
    found = []
    for folder, folders, names in os.walk(top, onerror=warn):
        folders[:] = [x for x in folders if x[0] != "." and not os.path.exists(f"{folder}/{x}/latest.pt")]
        names = [name for name in names if name[0] != "." and name.lower().endswith(EXTENSIONS)]
        found += [os.path.relpath(os.path.join(folder, name), top) for name in names]
    return sorted(found) or die(f"no pictures in {top} (looked for {' '.join(EXTENSIONS)})")

def read_image(path, side=None):
    """One picture as PIL RGB: upright, on white, 8 bits. A large JPEG may come smaller, no side below `side`.
    Raises OSError, with the path in it, for whatever cannot be read."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            image.draft(None, (side, side) if side else image.size)     # JPEG at 1/2, 1/4, 1/8: much faster
            image = ImageOps.exif_transpose(image)              # phones store the turn as a tag
        if image.mode.startswith("I"):                          # 16-bit grey: convert() clips it to white
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:                                  # decoders raise anything on broken files
        raise OSError(f"cannot read {path}: {error}") from None

def fit(image, args, rng=None):
    """PIL RGB of any size -> (3, size, size) uint8. With `rng`: resized to load_size, cropped and mirrored at
    random (in one resampling). Without: the whole picture (--resize stretch) or its central square."""
    (w, h), load_size = image.size, args.load_size if rng else args.size
    if args.mode == "translate" and args.native:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    step = np.array([w, h] if args.resize == "stretch" else [min(w, h)] * 2) / load_size    # in old pixels
    corner = (rng.random(2) if rng else 0.5) * ([w, h] - args.size * step)
    box = np.clip([*corner, *(corner + args.size * step)], 0, [w, h, w, h])
    image = image.resize((args.size, args.size), Image.Resampling.BICUBIC, box=tuple(box))
    image = ImageOps.mirror(image) if rng and args.flip and rng.random() < 0.5 else image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

@functools.lru_cache(maxsize=8)
def shuffled(n, *seed):
    """The numbers below n, in an order that depends on the seed alone."""
    return np.random.default_rng(seed).permutation(n)

class UnpairedImages(torch.utils.data.Dataset):
    """Item n of an endless stream: (A, B), each (3, size, size) uint8, drawn from their folders separately.
    An epoch has every picture of the larger domain once, repeats the smaller, and fills its last step up.
    An item depends on (seed, epoch, index) alone, whoever loads it: so a resumed run is the same run."""
    def __init__(self, args, step_pairs=1):
        self.args, self.files, self.names, self.bad = args, [], [], []
        args.load_size >= args.size or die(f"--load_size {args.load_size} is smaller than --size {args.size}")
        for tops in (args.dataA, args.dataB):
            found = [(top, name) for top in tops for name in find_images(top)]
            # One array of bytes: a list of str is copied into every worker bit by bit, by reference counting.
            self.files.append(np.array([os.fsencode(os.path.abspath(os.path.join(*pair))) for pair in found]))
            self.names.append(zlib.crc32(os.fsencode("\n".join(name for _, name in found))))
            self.bad.append(torch.zeros(len(found), dtype=torch.bool).share_memory_())      # in all workers
        paths, counts = np.unique(np.concatenate(self.files), return_counts=True)
        counts.max() == 1 or die(f"--dataA, --dataB: {os.fsdecode(paths[counts > 1][0])} is given twice")
        self.epoch_steps = -(-max(map(len, self.files)) // step_pairs)
        self.epoch_pairs = self.epoch_steps * step_pairs

    def __getitem__(self, n):
        return tuple(self.deal(domain, *divmod(n, self.epoch_pairs)) for domain in (0, 1))

    def deal(self, domain, epoch, index, augment=True):
        """Picture `index` of an epoch, of domain 0 (A) or 1 (B); every lap through it has another order."""
        files = self.files[domain]
        lap, index = divmod(index, len(files))
        seed = self.args.seed, domain, epoch, lap
        rng, k = np.random.default_rng((*seed, index)), shuffled(len(files), *seed)[index]
        for _ in range(1000):
            try:
                image = read_image(os.fsdecode(files[k]), self.args.load_size)
                return fit(image, self.args, rng if augment else None)
            except OSError as error:                            # a long run must not die of one broken file
                self.bad[domain][k] or warn(f"{error}; another takes its place")        # once
                self.bad[domain][k] = True
                k = rng.integers(len(files))
        raise OSError(f"--data{'AB'[domain]}: hardly a picture there can be read")

def quiet_worker(_):
    """Signals are for the main process, which still needs a batch to end its step; SIGTERM: 20 s more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))

def make_loader(data, steps, runtime):
    """Batches (real_A, real_B), (N, 3, size, size) uint8, for a range of steps; to each process its share."""
    n, cuda = data.args.batch_size, runtime.device.type == "cuda"
    starts = ((step * runtime.world + runtime.rank) * n for step in steps)
    auto = min(8, (os.cpu_count() or 1) // runtime.local_world) if cuda else 0
    return torch.utils.data.DataLoader(
        data, batch_sampler=(range(start, start + n) for start in starts), worker_init_fn=quiet_worker,
        num_workers=auto if data.args.workers is None else data.args.workers, pin_memory=cuda,
        generator=torch.Generator())                            # the global one is for the pools alone

# ---- 3. Generators -----------------------------------------------------------------------------------------
# Picture in, picture out, (N, 3, H, W) in [-1, 1]. All convolutions, so any size goes. Three habits: padding
# by reflection (ResNet, stride 1), for a frame of zeros would show; instance norm, for contrast belongs to a
# picture and not to the batch; tanh at the end, whose range is the pixels'.
class InstanceNorm(nn.Module):
    """Each channel of each picture to mean 0 and variance 1, (N, C, H, W) -> same; nothing learned. Not
    nn.InstanceNorm2d: its CPU gradients are wrong for a single picture in channels_last (torch 2.15)."""
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):      # CUDA's would make it float32
            return F.group_norm(x, x.shape[1])

def upsample(n_in, n_out, args, kernel=3):
    """Twice the side: transposed convolution (§7.2); or nearest and convolution, which leave no checkers."""
    if args.upsample == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(n_in, n_out, 3, padding=1))
    return nn.ConvTranspose2d(n_in, n_out, kernel, stride=2, padding=1, output_padding=kernel % 2)

class ResidualBlock(nn.Sequential):
    """x + change(x), (N, n, h, w) -> same. Most of a picture is to stay as it is: that comes for free."""
    def __init__(self, n):
        conv = functools.partial(nn.Conv2d, n, n, 3, padding=1, padding_mode="reflect")
        super().__init__(conv(), InstanceNorm(), nn.ReLU(), conv(), InstanceNorm())

    def forward(self, x):
        return x + super().forward(x)

class ResNetGenerator(nn.Module):
    """The paper's (§7.2): 11,378,179 parameters with 9 blocks, 7,837,699 with 6. H and W: multiples of 4."""
    multiple = 4
    def __init__(self, args):
        super().__init__()
        n, block = args.ngf, lambda conv: nn.Sequential(conv, InstanceNorm(), nn.ReLU())
        self.stem = block(nn.Conv2d(3, n, 7, padding=3, padding_mode="reflect"))
        self.down1 = block(nn.Conv2d(n, 2 * n, 3, stride=2, padding=1))
        self.down2 = block(nn.Conv2d(2 * n, 4 * n, 3, stride=2, padding=1))
        self.blocks = nn.Sequential(*[ResidualBlock(4 * n) for _ in range(args.blocks)])
        self.up1 = block(upsample(4 * n, 2 * n, args))
        self.up2 = block(upsample(2 * n, n, args))
        self.head = nn.Conv2d(n, 3, 7, padding=3, padding_mode="reflect")

    def forward(self, x):                       # (N,   3, H,   W)
        x = self.stem(x)                        # (N,  64, H,   W)
        x = self.down1(x)                       # (N, 128, H/2, W/2)
        x = self.down2(x)                       # (N, 256, H/4, W/4)
        x = self.blocks(x)                      # (N, 256, H/4, W/4)
        x = self.up1(x)                         # (N, 128, H/2, W/2)
        x = self.up2(x)                         # (N,  64, H,   W)
        return self.head(x).tanh()              # (N,   3, H,   W)

class UNetGenerator(nn.Module):
    """pix2pix's U-Net: halve the side as often as it goes, 8 times at most, double it back, hand each level's
    features across. H and W multiples of 2**levels. Parameters: 54,409,603 with 8 levels (256 pixels)."""
    multiple = 32                               # at least; each network sets its own
    def __init__(self, args):
        super().__init__()
        levels = max(k for k in range(9) if args.size % 2**k == 0)
        self.multiple = 2**levels
        n = [3] + [args.ngf * min(2**k, 8) for k in range(levels)]
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for k in range(levels):                 # no norm outermost; nor innermost: on 1x1 it leaves 0
            relu, norm = [nn.LeakyReLU(0.2)] * (k > 0), [InstanceNorm()] * (0 < k < levels - 1)
            self.downs.append(nn.Sequential(*relu, nn.Conv2d(n[k], n[k + 1], 4, 2, 1), *norm))
        for k in reversed(range(levels)):       # fed from below and, but for the innermost, from across
            conv = upsample(n[k + 1] * (1 if k == levels - 1 else 2), n[k], args, kernel=4)
            self.ups.append(nn.Sequential(nn.ReLU(), conv, *([InstanceNorm()] if k > 0 else [])))

    def forward(self, x):                       # (N,   3, H,     W)
        across = []
        for down in self.downs:
            x = down(x)                         # (N,  64, H/2,   W/2) ... (N, 512, H/256, W/256)
            across.append(x)
        x = self.ups[0](across.pop())           # (N, 512, H/128, W/128)
        for up in self.ups[1:]:
            x = up(torch.cat([across.pop(), x], dim=1))     # (N, 512, H/64, W/64) ... (N, 3, H, W)
        return x.tanh()                         # (N,   3, H,     W)

GENERATORS = {"resnet": ResNetGenerator, "unet": UNetGenerator}

# ---- 4. Discriminator --------------------------------------------------------------------------------------
# Not one verdict but hundreds, one for each 70x70 patch (§4), on colour and texture; the cycle looks after
# the layout. Back from a score, side = (side - 1) * stride + 4: a patch grows 1 -> 4 -> 7 -> 16 -> 34 -> 70.
class PatchDiscriminator(nn.Sequential):
    """70x70 PatchGAN (§7.2), 2,764,737 parameters. Raw scores: the losses know what to make of them."""
    def __init__(self, args):
        n = args.ndf
        super().__init__(                                                           # (N,   3, H,     W)
            nn.Conv2d(3, n, 4, 2, 1), nn.LeakyReLU(0.2),                            # (N,  64, H/2,   W/2)
            nn.Conv2d(n, 2 * n, 4, 2, 1), InstanceNorm(), nn.LeakyReLU(0.2),        # (N, 128, H/4,   W/4)
            nn.Conv2d(2 * n, 4 * n, 4, 2, 1), InstanceNorm(), nn.LeakyReLU(0.2),    # (N, 256, H/8,   W/8)
            nn.Conv2d(4 * n, 8 * n, 4, 1, 1), InstanceNorm(), nn.LeakyReLU(0.2),    # (N, 512, H/8-1, W/8-1)
            nn.Conv2d(8 * n, 1, 4, 1, 1))                                           # (N,   1, H/8-2, W/8-2)
    def forward(self, x):                           # inherited, it is not compiled whole by torch 2.11
        return super().forward(x)

def init_weights(module):
    """N(0, 0.02) for the weights of every convolution (§7.1), 0 for its bias."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)

# ---- 5. Image pool -----------------------------------------------------------------------------------------
# A discriminator that sees only the newest fakes forgets old tricks, and the generators come back to them:
# round and round instead of better. So half the fakes it sees are older (§4, Shrivastava et al. 2017).
class ImagePool:
    """Up to `size` earlier fakes of one domain; size 0 is off."""
    def __init__(self, size):
        self.size, self.images = size, []

    def query(self, fakes):
        """(N, 3, H, W), detached -> same. Once full, each fake is swapped for a stored one half the time."""
        shown = list(fakes)
        for i, fake in enumerate(fakes if self.size else []):
            if len(self.images) < self.size:
                self.images.append(fake.clone())
            elif torch.rand(()) < 0.5:
                k = int(torch.randint(self.size, ()))
                shown[i], self.images[k] = self.images[k], fake.clone()
        return torch.stack(shown)

# ---- 6. Objective ------------------------------------------------------------------------------------------
# Three wishes for a generator. Adversarial (Eq. 1): the result passes for the other domain; but one picture
# of that domain would do for every source. Cycle (Eq. 2): the way back finds the source; but a tint, or all
# colours inverted, can be undone on the way. Identity (§5.2): G_AB leaves a real B as it is, colours and all.
#   Healthy (lsgan): D(real) and D(fake) stay apart but near 0.5; D_A, D_B are 0.1 to 0.25 (0.25: guessing),
# adv 0.3 to 0.6; cycle and idt (logged times their weight) fall for long. Dead: D_A, D_B near 0, adv near 1,
# for good. Copying: the same numbers, for fake_B is real_A again, which D_B tells with ease: see the grid.
def lsgan(scores, target):
    """Least squares (§4, Mao et al. 2017): a fake taken for real, but not near 1, is still moved."""
    return F.mse_loss(scores, torch.full_like(scores, target))

def bce(scores, target):
    """Cross-entropy on logits: Eq. 1, G's side non-saturating; a fake once taken for real moves no more."""
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))

def focal(scores, target, gamma=2.0):
    """Lin et al. 2017, Eq. 4: cross-entropy times (1 - p)^gamma: patches already told apart count little."""
    entropy = F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target), reduction="none")
    return ((1 - (-entropy).exp()) ** gamma * entropy).mean()                   # exp(-entropy) is p

def ghm(scores, target, bins=10):
    """GHM-C, Li et al. 2019, Eq. 7: mean cross-entropy in each bin of like gradient |p - target|, then over
    the bins in use: neither the many easy patches nor a few outliers rule."""
    entropy = F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target), reduction="none")
    bin_of = ((scores.detach().sigmoid() - target).abs() * bins).long().clamp(max=bins - 1)
    in_bin = F.one_hot(bin_of.flatten(), bins).to(entropy.dtype)                # (patches, bins)
    count = in_bin.sum(0)
    return ((entropy.flatten()[:, None] * in_bin).sum(0) / count.clamp(min=1)).sum() / (count > 0).sum()

# Name: (loss of D, loss of G). Focal and GHM-C weigh D's patches; their generators get plain cross-entropy.
GAN_LOSSES = {"lsgan": (lsgan, lsgan), "bce": (bce, bce), "focal": (focal, bce), "ghm": (ghm, bce)}

class CycleGAN(nn.Module):
    """Both generators, both discriminators and what each pair minimises; built from the flags alone."""
    def __init__(self, args):
        super().__init__()
        new = GENERATORS[args.generator]
        args.size % new.multiple == 0 or die(f"--size {args.size} is not a multiple of {new.multiple}")
        self.G = nn.ModuleDict({name: new(args) for name in ("AB", "BA")})
        self.D = nn.ModuleDict({name: PatchDiscriminator(args) for name in ("A", "B")})
        self.d_loss, self.g_loss = GAN_LOSSES.get(args.gan_loss) or die(f"no --gan_loss {args.gan_loss} here")
        self.lambda_cycle, self.weight_identity = args.lambda_cycle, args.lambda_cycle * args.lambda_identity
        self.apply(init_weights)

    def generator_loss(self, real_A, real_B):
        """Eq. 3 and the identity term. Pictures: (N, 3, H, W) in [-1, 1].
        -> loss, terms (name: weighted scalar; they add up to the loss), fake_A, fake_B (detached)."""
        n, identity = len(real_A), self.weight_identity > 0
        # Instance norm never mixes pictures: what is to be translated and what to be left alone share a pass.
        out_B = self.G.AB(torch.cat([real_A, real_B]) if identity else real_A)
        out_A = self.G.BA(torch.cat([real_B, real_A]) if identity else real_B)
        fake_B, idt_B = out_B[:n], out_B[n:]
        fake_A, idt_A = out_A[:n], out_A[n:]
        rec_A, rec_B = self.G.BA(fake_B), self.G.AB(fake_A)
        terms = {"adv_AB": self.g_loss(self.D.B(fake_B), 1.0),
                 "adv_BA": self.g_loss(self.D.A(fake_A), 1.0),
                 "cycle_A": self.lambda_cycle * (rec_A - real_A).abs().mean(),
                 "cycle_B": self.lambda_cycle * (rec_B - real_B).abs().mean()}
        if identity:
            terms["idt_A"] = self.weight_identity * (idt_A - real_A).abs().mean()
            terms["idt_B"] = self.weight_identity * (idt_B - real_B).abs().mean()
        return sum(terms.values()), terms, fake_A.detach(), fake_B.detach()

    def discriminator_loss(self, real_A, real_B, fake_A, fake_B):
        """Real is to score 1, fake 0. Halved, meant to slow D (§7.1), though Adam hardly feels a factor.
        -> loss, terms (the two losses, and the mean raw scores of real and fake; logits, but for lsgan)."""
        n = len(real_A)
        score_A = self.D.A(torch.cat([real_A, fake_A]))
        score_B = self.D.B(torch.cat([real_B, fake_B]))
        D_A = 0.5 * (self.d_loss(score_A[:n], 1.0) + self.d_loss(score_A[n:], 0.0))
        D_B = 0.5 * (self.d_loss(score_B[:n], 1.0) + self.d_loss(score_B[n:], 0.0))
        real, fake = (score_A[:n] + score_B[:n]).mean() / 2, (score_A[n:] + score_B[n:]).mean() / 2
        return D_A + D_B, {"D_A": D_A, "D_B": D_B, "D(real)": real, "D(fake)": fake}

# ---- 7. One step -------------------------------------------------------------------------------------------
def train_step(model, pools, runtime, real_A, real_B):
    """Move the generators, then the discriminators. Pictures: (N, 3, H, W) in [-1, 1]. -> terms, by name."""
    model.D.requires_grad_(False)           # G's gradient passes through D; D's own is not needed
    with runtime.autocast():
        loss, g_terms, fake_A, fake_B = model.generator_loss(real_A, real_B)
    runtime.update("G", loss)
    model.D.requires_grad_(True)            # the fakes came detached: from here no gradient reaches G
    fake_A, fake_B = pools["A"].query(fake_A), pools["B"].query(fake_B)
    with runtime.autocast():
        loss, d_terms = model.discriminator_loss(real_A, real_B, fake_A, fake_B)
    runtime.update("D", loss)
    return g_terms | d_terms

# ---- 8. Plumbing -------------------------------------------------------------------------------------------
class Runtime:
    """Skip this at first: it changes no mathematics. Device, precision, compiling; `rank` among `world`."""
    def __init__(self, args):
        env = lambda name, default: int(os.environ.get(name) or default)         # set by torchrun
        self.rank, self.world = env("RANK", 0), env("WORLD_SIZE", 1)
        local_rank, self.local_world = env("LOCAL_RANK", 0), env("LOCAL_WORLD_SIZE", 1)
        best = torch.accelerator.current_accelerator(check_available=True)
        kind = args.device if args.device != "auto" else best.type if best else "cpu"
        try:
            self.device = torch.device(f"cuda:{local_rank}" if kind == "cuda" else kind)
            torch.zeros(1, device=self.device).item()           # "meta" has no values
        except Exception as error:
            die(f"--device {kind} is not to be had here ({str(error)[:100]}); --device cpu is")
        cuda = self.device.type == "cuda"
        cuda and torch.cuda.set_device(self.device)
        bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if cuda else    # emulated on a T4
                self.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
        amp = args.amp if args.amp != "auto" else "bf16" if bf16 else "fp16" if cuda else "off"
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
        self.to_float = lambda x: x.to(self.device, non_blocking=cuda).float() / 127.5 - 1  # to [-1, 1]
        self.autocast = lambda: torch.autocast(self.device.type, self.dtype, enabled=amp != "off")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")     # else it does nothing
        if self.world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, device_id=self.device if cuda else None)
    def prepare(self, model, args, steps):
        """Move the networks here, give them optimizers, and compile them if `steps` steps are worth it."""
        adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, 0.999), fused=True)
        self.optimizers = {k: adam(nets.parameters()) for k, nets in model.to(self.device).named_children()}
        torch.backends.cudnn.benchmark = True                   # sizes stay: try every algorithm once
        if args.compile == "on" or args.compile == "auto" and self.device.type == "cuda" and steps >= 2000:
            torch._dynamo.config.suppress_errors = args.compile == "auto"   # no compiler, old GPU: run eager
            for network in (*model.G.values(), *model.D.values()):
                network.compile(dynamic=False)
    def update(self, name, loss):
        """Back-propagate `loss` and step the optimizer of "G" or "D". The only place that does either."""
        optimizer = self.optimizers[name]
        self.scaler.scale(loss).backward()
        self.average([p.grad for p in optimizer.param_groups[0]["params"]])
        self.scaler.step(optimizer)                             # after averaging: one overflow is everyone's
        self.scaler.update()
        for each in self.optimizers.values():                   # both, at once: the next pass needs memory
            each.zero_grad()
    def average(self, tensors):
        """Mean over processes, in place: one flat all-reduce, after the backward pass, not during it."""
        if self.world > 1:
            flat = nn.utils.parameters_to_vector(tensors)
            try:
                dist.all_reduce(flat)
            except RuntimeError as error:
                die(f"lost the other processes ({error}); --resume goes on from the last checkpoint")
            nn.utils.vector_to_parameters(flat.div_(self.world), tensors)

# ---- 9. Outputs --------------------------------------------------------------------------------------------
# Samples: look at rows 2 and 5, the translations, then whether 3 and 6 lead back to 1 and 4. Losses: see 6.
save_png = functools.partial(save_image, format="png", normalize=True, value_range=(-1, 1))
def save(path, write, thing, **options):
    """write(thing, file), under another name until complete: a crash or a full disk leaves what was there."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.part", "wb") as file:
            write(thing, file, **options)
            file.flush(), os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:                    # RuntimeError: torch.save's for a full disk
        os.path.exists(f"{path}.part") and os.remove(f"{path}.part")
        die(f"cannot write {path} ({error}); what was there before is untouched")

@torch.no_grad()
def save_samples(path, model, runtime, real_A, real_B):
    """A grid, a column a picture; rows: real A, fake B, back to A, real B, fake A, back to B."""
    AB, BA = model.G.AB.forward, model.G.BA.forward             # .forward: compiling is not worth it
    with runtime.autocast():
        fake_B, fake_A = AB(real_A), BA(real_B)
        rows = [real_A, fake_B, BA(fake_B), real_B, fake_A, AB(fake_A)]
    save(path, save_png, torch.cat(rows).cpu(), nrow=len(real_A))

class Log:
    """The mean of every term since the last row: into log.csv (its lines: `rows`) and onto the terminal."""
    def __init__(self, args, runtime, total, epoch_steps):
        self.args, self.runtime, self.total, self.epoch_steps = args, runtime, total, epoch_steps
        self.rows, self.written, self.sums, self.start, self.steps, self.waited = [], 0, {}, time.time(), 0, 0
        if args.tensorboard and runtime.rank == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(args.out_dir)
    def add(self, step, terms, waited):
        """Add up a step's terms, without waiting for the device, and the seconds spent waiting for data."""
        self.sums = {name: self.sums.get(name, 0) + term.detach().float() for name, term in terms.items()}
        self.steps, self.waited = self.steps + 1, self.waited + waited
        if self.runtime.rank == 0 and sys.stdout and sys.stdout.isatty():
            print(f"\r\033[K{step}/{self.total}", end="\r", flush=True)
    def row(self, step, rate):
        """Write the row that ends with `step`, means over processes -> text. Exits if one is not finite."""
        means = torch.stack(list(self.sums.values())) / self.steps
        self.runtime.average([means])
        seconds, means = time.time() - self.start, dict(zip(self.sums, means.tolist()))
        if bad := [name for name, value in means.items() if not np.isfinite(value)]:
            die(f"step {step}: {', '.join(bad)} not finite; try --resume with a lower --lr or with --amp off")
        speed = 2 * self.steps * self.args.batch_size * self.runtime.world / seconds      # A and B
        row = {"step": step, "epoch": step / self.epoch_steps, "rate": rate, **means,
               "images_per_s": round(speed, 2), "waiting": round(self.waited / seconds, 4)}
        header, line = (",".join(map(str, part)) + "\n" for part in (row, row.values()))
        headers = [old for old in self.rows if old.startswith("step")]
        self.rows += [line] if headers[-1:] == [header] else [header, line]     # at first; when terms change
        text = (f"step {step}/{self.total}  epoch {row['epoch']:.2f}  rate {rate:.2e}  "
                + "  ".join(f"{name} {value:.3f}" for name, value in means.items())
                + f"  {speed:.1f} images/s  waiting {row['waiting']:.0%}  "
                f"{datetime.timedelta(0, (self.total - step) * seconds // self.steps)} to go")
        if self.runtime.rank == 0:                              # at first, also those of before a resume
            with open(f"{self.args.out_dir}/log.csv", "a" if self.written else "w") as file:
                file.writelines(self.rows[self.written:])
            for name, value in means.items() if self.args.tensorboard else ():
                self.board.add_scalar(name, value, step)
        self.written, self.sums, self.start, self.steps, self.waited = len(self.rows), {}, time.time(), 0, 0.0
        return text

def load_checkpoint(path):
    """A checkpoint, or the latest.pt in a run's folder, as a dict of plain values and tensors on the CPU."""
    try:
        state = torch.load(f"{path}/latest.pt" if os.path.isdir(path) else path, "cpu", weights_only=True)
        "args" in state and GENERATORS[state["args"]["generator"]]     # KeyError: a fork's
        return {str(k): v for k, v in state.items()}
    except Exception as error:
        die(f"{path} cannot be read: no checkpoint, half of one, or a fork's ({str(error)[:50]})")

# ---- 10. Train ---------------------------------------------------------------------------------------------
def lr_at(step, args, epoch_steps):
    """The rate of a step, from 0 on: constant for `epochs`, then linear to 0 in `epochs_decay` (§7.1)."""
    decayed = step - args.epochs * epoch_steps
    return args.lr * min(1.0, 1 - decayed / max(1, args.epochs_decay * epoch_steps))

def resume_flags(args):
    """-> flags and checkpoint of the run that --resume names."""
    saved = load_checkpoint(args.resume)
    {"ranks", "args"} <= {*saved} or die(f"{args.resume}: no run's latest.pt (--mode translate may take it)")
    saved["args"]["out_dir"] = os.path.normpath(args.resume + ("/.." if os.path.isfile(args.resume) else ""))
    for name in {"generator", "blocks", "ngf", "ndf", "upsample", "size", "seed", "out_dir"} & {*args.given}:
        old, new = saved["args"][name], args.given[name]
        old == new or die(f"--{name} {new}: the run has {old}, and that cannot change on the way")
    return argparse.Namespace(**vars(args) | saved["args"] | args.given), saved

def train(args):
    """Train, from scratch or from --resume; fills args.out_dir. Returns 128 + its number after a signal."""
    args, saved = resume_flags(args) if args.resume else (args, None)
    runtime = Runtime(args)
    torch.manual_seed(args.seed)                                # the same weights everywhere
    model, step_pairs = CycleGAN(args), args.batch_size * runtime.world
    data = UnpairedImages(args, step_pairs)
    args.dataA, args.dataB = ([os.path.abspath(top) for top in tops] for tops in (args.dataA, args.dataB))
    args.out_dir = args.out_dir or f"runs/{os.path.basename(args.dataA[0])}2{os.path.basename(args.dataB[0])}"
    if not saved and os.path.exists(f"{args.out_dir}/generators.pt"):
        die(f"{args.out_dir} holds a run: go on with --resume {args.out_dir}, or choose another --out_dir")
    total = min((args.epochs + args.epochs_decay) * data.epoch_steps, args.max_steps or 10**12)
    first = saved["pairs"] // step_pairs if saved else 0        # in steps of now: the batch may be another
    runtime.prepare(model, args, total - first)
    pools = {"A": ImagePool(args.pool_size), "B": ImagePool(args.pool_size)}
    torch.manual_seed(args.seed + runtime.rank)                 # from here on only the pools draw from it
    parts = {"model": model, "scaler": runtime.scaler, **runtime.optimizers}
    log, out = Log(args, runtime, total, data.epoch_steps), args.out_dir
    say = functools.partial(print, flush=True) if runtime.rank == 0 else lambda *_: None
    if saved:
        saved["names"] == data.names or die(f"--dataA, --dataB: not the pictures of {out}")
        for name, part in parts.items():
            saved[name] and part.load_state_dict(saved[name])       # empty: a scaler that was off
        log.rows, n = saved["rows"], len(saved["ranks"])
        mine = saved["ranks"][runtime.rank % n]                 # this process's random state and pools
        torch.set_rng_state(mine["rng"])
        for name, pool in pools.items():
            pool.images = [image.to(runtime.device) for image in mine[name][:pool.size]]
        n == runtime.world or say(f"{n} processes before, {runtime.world} now")
        if first >= total:
            return say(f"{out} is finished, {first} steps; for more, raise --epochs or --max_steps")
    say(f"{out}: {len(data.files[0])} A, {len(data.files[1])} B, {data.epoch_steps} steps an epoch, "
        f"{total - first} to go; {runtime.world} x {runtime.device}, {runtime.dtype}, batch {step_pairs}, "
        f"rate {args.lr:g}")
    def checkpoint(step):
        for name, weight in model.named_parameters():
            weight.isfinite().all() or die(f"step {step}: {name} not finite; the last checkpoint is kept")
        mine = {k: [x.cpu() for x in p.images] for k, p in pools.items()} | {"rng": torch.get_rng_state()}
        ranks = [mine] * runtime.world
        runtime.world > 1 and dist.gather_object(mine, ranks if runtime.rank == 0 else None)
        if runtime.rank == 0:
            flags = {name: value for name, value in vars(args).items() if name not in ("given", "resume")}
            state = {name: part.state_dict() for name, part in parts.items()} | {
                "args": flags, "step": step, "epoch": step // data.epoch_steps, "pairs": step * step_pairs,
                "names": data.names, "rows": log.rows, "ranks": ranks}
            save(f"{out}/generators.pt", torch.save, dict(args=flags, model=model.G.state_dict(prefix="G.")))
            save(f"{out}/latest.pt", torch.save, state)
    signals = []
    def stop(number, _):                                        # noted now, acted on after the step
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)            # a second Ctrl-C ends at once
    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
    fixed = [torch.stack([data.deal(domain, 0, i, augment=False) for i in range(6)]) for domain in (0, 1)]
    saved or checkpoint(0)                                      # a disk that cannot be written to shows now
    batches = iter(make_loader(data, range(first, total), runtime))
    for step in range(first, total):
        asked, (real_A, real_B), got = time.time(), next(batches), time.time()
        rate = lr_at(step, args, data.epoch_steps)
        for optimizer in runtime.optimizers.values():
            optimizer.param_groups[0].update(lr=rate, betas=(args.beta1, 0.999))
        terms = train_step(model, pools, runtime, runtime.to_float(real_A), runtime.to_float(real_B))
        step += 1                                               # from here on: steps done
        log.add(step, terms, got - asked)
        stopping = torch.tensor(float(len(signals)))            # on the CPU: no wait for a GPU
        runtime.average([stopping])                             # one process is to stop: all do
        last = step == total or stopping
        batches = None if last else batches                     # the workers end before the saving begins
        saving = last or step % args.save_every == 0 or step % data.epoch_steps == 0
        row = log.row(step, rate) if saving or step % args.log_every == 0 else ""
        if runtime.rank == 0 and (last or step % args.sample_every == 0):
            save_samples(f"{out}/samples/step_{step:07}.png", model, runtime, *map(runtime.to_float, fixed))
        saving and checkpoint(step)
        row and say(row)                                        # once saved: Ctrl-C has ended a `| tee`, too
        if last and step < total:
            say(f"stopped at step {step}, saved; to go on: python cyclegan.py --resume {shlex.quote(out)}")
            return 128 + (signals or [signal.SIGTERM])[0]
    say(f"done: look into {out}/samples; {out}/generators.pt is for --mode translate")

# ---- 11. Translate -----------------------------------------------------------------------------------------
# One generator is enough: the other, and both discriminators, were only there to teach it.
def load_generator(path, direction, device="cpu"):
    """-> one generator, of a run's generators.pt or bare from other CycleGAN code, and its flags (a dict).
    Layers have other names there, but the convolutions and their order are the same: it loads by order."""
    state = load_checkpoint(path)
    flags, state = (state["args"], state["model"]) if {"args", "model"} <= {*state} else ({}, state)
    prefix = f"G.{direction[0] + direction[-1]}." if flags else ""
    weights = {k: v for k, v in state.items() if torch.is_tensor(v) and k.startswith(prefix) and (
        flags or not k.endswith(("running_mean", "running_var", "num_batches_tracked")))}       # old official
    if not flags:                                               # read off the shapes of its convolutions
        convs = [value.shape for value in weights.values() if value.ndim == 4]
        len(convs) > 5 and convs[0][1] == 3 or die(f"{path} holds no generator of a CycleGAN")
        unet, deconv = convs[0][2] == 4, convs[-3][0] > convs[-3][1]
        flags = {"generator": "unet" if unet else "resnet", "size": 2 ** (len(convs) // 2) if unet else 256,
                 "upsample": "deconv" if unet or deconv else "nearest", "ngf": convs[0][0],
                 "blocks": (len(convs) - 6) // 2}
    G = GENERATORS[flags["generator"]](argparse.Namespace(**flags))
    if [value.shape for value in G.state_dict().values()] != [value.shape for value in weights.values()]:
        die(f"{path}: its layers are not those of a {flags['generator']} generator")
    G.load_state_dict(dict(zip(G.state_dict(), weights.values())))
    if any("down_blocks" in name for name in weights):          # the DGAI book's chapter pads by reflection
        G.down1[0].padding_mode = G.down2[0].padding_mode = "reflect"
    return G.to(device), flags

def translate_any(G, x):
    """G on one (1, 3, H, W) of any size: mirrored out to the multiple that G needs, and cut back."""
    h, w = x.shape[-2:]
    below, right = (max(-side % G.multiple, 8 - side) for side in (h, w))
    mode = "reflect" if below < h and right < w else "replicate"
    return G(F.pad(x, (0, right, 0, below), mode=mode))[..., :h, :w]

def plan(args):
    """-> {target: source} for all of --input: the same tree, the same names, as yet without .png."""
    jobs, taken, ends = {}, set(), ["", "_back"] if args.round_trip else [""]
    for top in args.input:
        folder = os.path.isdir(top)
        folder or os.path.exists(top) or die(f"--input: no file or folder {top}")
        for name in find_images(top) if folder else [os.path.basename(top)]:
            target, spare = (os.path.join(args.output, path) for path in (os.path.splitext(name)[0], name))
            while taken & {target + end for end in ends}:
                target, spare = spare, spare + "_"              # a.jpg and a.png: a.png and a.png.png
            taken |= {target + end for end in ends}
            jobs[target] = os.path.join(top, name) if folder else top
    lost = {os.path.realpath(target + ".png") for target in taken} & {*map(os.path.realpath, jobs.values())}
    same = args.truth and os.path.realpath(args.truth) == os.path.realpath(args.output)
    (lost or same) and die(f"--output {args.output}: pictures there would be overwritten; choose another")
    return jobs

@torch.no_grad()
def translate(args):
    """Translate all of --input into --output; returns 1 if there were any that could not be."""
    runtime, jobs = Runtime(args), plan(args)
    there, flags = load_generator(args.checkpoint, args.direction, runtime.device)
    if args.round_trip:
        "seed" in flags or die("--round_trip needs a run's generators.pt: both ways")
        other = "BtoA" if args.direction == "AtoB" else "AtoB"
        back, _ = load_generator(args.checkpoint, other, runtime.device)
    vars(args).update({name: flags[name] for name in ("size", "resize") if name in flags} | args.given)
    sums, load = torch.zeros(9), lambda path: runtime.to_float(fit(read_image(path), args))[None]
    truths = {os.path.join(args.output, os.path.splitext(name)[0]): os.path.join(args.truth, name)
              for name in (find_images(args.truth) if args.truth else [])}
    not args.truth or truths.keys() & jobs.keys() or die(f"--truth {args.truth}: no names of --input there")
    for target, path in list(jobs.items())[runtime.rank::runtime.world]:
        try:
            x = load(path)
            y = translate_any(there, x)
            save(f"{target}.png", save_png, y)
            if args.round_trip:
                save(f"{target}_back.png", save_png, translate_any(back, y))
            sums[7] += 1
            if target in truths:
                truth = load(truths[target])
                changed, miss = (x != truth).any(1), (y - truth).abs().mean(1)
                psnr = -10 * ((y - truth) / 2).square().mean().log10()
                sums[:7] += torch.tensor([miss[changed].sum(), (x - truth).abs().mean(1).sum(), changed.sum(),
                                          miss.sum(), miss.numel(), psnr, 1])
        except (OSError, RuntimeError) as error:
            warn(error if path in str(error) else f"{path}: {error}")
            sums[8] += 1
    runtime.average([sums])
    inner, before, n_inner, miss, n, psnr, compared, done, failed = (sums * runtime.world).tolist()
    runtime.rank or print(f"translated {done:.0f} of {len(jobs)} pictures into {args.output}")
    if runtime.rank == 0 and compared:
        print(f"{compared:.0f} compared: absolute error {miss / n:.3f}, PSNR {psnr / compared:.1f} dB; where "
              f"input and truth differ {inner / (n_inner or 1):.3f}, {inner / (before or 1):.1%} of input's; "
              f"elsewhere {(miss - inner) / (n - n_inner or 1):.3f}", flush=True)
    return int(failed > 0)

def demo(argv, args):
    """Draw toy faces, then run the plain commands it prints, each with the flags typed beside --demo."""
    from prepare_celeba import toy_faces
    toy_faces("files/toy", 400, 50)
    out, typed = args.out_dir or "runs/demo", [word for word in argv if word != "--demo"]
    new = ("--dataA files/toy/black --dataB files/toy/blond --out_dir OUT --size 64 --load_size 68 --lr 1e-3 "
           "--generator unet --ngf 16 --ndf 16 --batch_size 4 --epochs 8 --epochs_decay 16 --amp off")
    commands = ["--resume OUT" if os.path.exists(f"{out}/latest.pt") else new]
    for direction, a, b in (("AtoB", "black", "blond"), ("BtoA", "blond", "black")):
        commands.append(f"--mode translate --checkpoint OUT/generators.pt --direction {direction} "
                        f"--input files/toy/{a}_test --truth files/toy/{b}_test --output OUT/{b}")
    for command in commands:
        words = [word.replace("OUT", out) for word in command.split()] + typed
        print("\npython cyclegan.py", shlex.join(words), flush=True)
        if status := main(words):
            return status
    print(f"\nopen {out}/samples/{max(os.listdir(f'{out}/samples'))}: rows 2 and 5 are made, 1 and 4 real")

def main(argv):
    """Run a command line, a list of words; returns its exit status."""
    args = get_args(argv)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        run = functools.partial(demo, argv) if args.demo else translate if args.mode == "translate" else train
        return run(args) or 0
    except Exception as error:                  # no tensorboard, disk, memory: one line; a bug: all of them
        if any(words in repr(error) for words in ("MemoryError", "out of memory", "allocate memory")):
            die("out of memory: a smaller --size, --batch_size or --ngf needs less")
        isinstance(error, (ImportError, OSError)) and die(str(error).splitlines()[-1])
        traceback.clear_frames(error.__traceback__)             # without the loader, its workers end at once
        raise
    finally:
        signal.signal(signal.SIGINT, before[0]), signal.signal(signal.SIGTERM, before[1])

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                # no traceback
    status = main(sys.argv[1:])
    dist.is_initialized() and dist.destroy_process_group()      # or torch may abort while the process ends
    sys.exit(status)
