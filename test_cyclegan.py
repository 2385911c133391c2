"""
The tests of cyclegan.py and prepare_celeba.py, the textbook step, and the benchmark.
  pytest                                                     minutes on two cores, without a GPU or a network
  python test_cyclegan.py --bench --size 128 --batch_size 4  the real step and the textbook step in turns
The textbook step is the paper with PyTorch's own layers, one call for each arrow of its Figure 3, nothing
merged. Every fast path of cyclegan.py has to give the same losses and gradients.
"""
import argparse, contextlib, functools, gc, itertools, multiprocessing, os, pathlib, pickle, re
import resource, shutil, signal, socket, statistics, subprocess, sys, time, types, zipfile
import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
import cyclegan, prepare_celeba

ROOT = pathlib.Path(__file__).resolve().parent
CELEBA = ROOT / "../shared/data/celeba"
SMALL = "--size 32 --load_size 36 --ngf 2 --ndf 2 --blocks 1 --device cpu --workers 0".split()

# ---- The textbook step -----------------------------------------------------------------------------------
class Residual(nn.Sequential):
    def __init__(self, n):
        half = lambda: [nn.ReflectionPad2d(1), nn.Conv2d(n, n, 3), nn.InstanceNorm2d(n)]
        super().__init__(*half(), nn.ReLU(), *half())
    def forward(self, x):
        return x + super().forward(x)
def textbook_resnet(n, blocks, upsample="deconv"):
    """§7.2: c7s1-64, d128, d256, R256 x blocks, u128, u64, c7s1-3."""
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, n, 7), nn.InstanceNorm2d(n), nn.ReLU()]
    for a in (n, 2 * n):
        layers += [nn.Conv2d(a, 2 * a, 3, stride=2, padding=1), nn.InstanceNorm2d(2 * a), nn.ReLU()]
    layers += [Residual(4 * n) for _ in range(blocks)]
    for a in (4 * n, 2 * n):
        up = [nn.Upsample(scale_factor=2), nn.Conv2d(a, a // 2, 3, padding=1)]
        up = up if upsample == "nearest" else [nn.ConvTranspose2d(a, a // 2, 3, 2, 1, output_padding=1)]
        layers += [*up, nn.InstanceNorm2d(a // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(n, 3, 7), nn.Tanh())
class TextbookUNet(nn.Module):
    """pix2pix's U-Net as its paper nests it: a level is down, what is inside, up; its input goes across."""
    def __init__(self, ngf, levels, outer=3, k=0, upsample="deconv"):
        super().__init__()
        inner, top, last = ngf * min(2**k, 8), k == 0, k == levels - 1
        n, self.top = inner if last else 2 * inner, top
        layers = [] if top else [nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(outer, inner, 4, 2, 1)] + ([] if top or last else [nn.InstanceNorm2d(inner)])
        layers += [] if last else [TextbookUNet(ngf, levels, inner, k + 1, upsample)]
        layers += [nn.ReLU()] + ([nn.ConvTranspose2d(n, outer, 4, 2, 1)] if upsample == "deconv" else
                                 [nn.Upsample(scale_factor=2), nn.Conv2d(n, outer, 3, padding=1)])
        self.layers = nn.Sequential(*layers, nn.Tanh() if top else nn.InstanceNorm2d(outer))
    def forward(self, x):
        return self.layers(x) if self.top else torch.cat([x, self.layers(x)], dim=1)
def textbook_patchgan(n):
    """§7.2: C64, C128, C256, C512 and one score for each 70x70 patch."""
    layers = [nn.Conv2d(3, n, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for a, b, stride in ((n, 2 * n, 2), (2 * n, 4 * n, 2), (4 * n, 8 * n, 1)):
        layers += [nn.Conv2d(a, b, 4, stride=stride, padding=1), nn.InstanceNorm2d(b), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8 * n, 1, 4, stride=1, padding=1))
def textbook_gan_loss(name, scores, real, for_d):
    """Eq. 1 in four variants; focal (Lin et al., Eq. 4) and GHM-C (Li et al., Eqs 3-7) are for D alone."""
    if name == "lsgan":
        return ((scores - 1) ** 2 if real else scores**2).mean()
    p = torch.sigmoid(scores) if real else 1 - torch.sigmoid(scores)         # probability of the truth
    entropy = -F.logsigmoid(scores if real else -scores)
    if name == "bce" or not for_d:
        return entropy.mean()
    if name == "focal":
        return ((1 - p) ** 2 * entropy).mean()
    length = (1 - p).detach()
    bins = [(length >= k / 10) & ((length < (k + 1) / 10) | (k == 9)) for k in range(10)]
    means = [entropy[inside].mean() for inside in bins if inside.any()]
    return sum(means) / len(means)
class Textbook:
    """The paper's four networks and its objective, Eqs 1-3 and §5.2, with one call a network and purpose."""
    def __init__(self, args):
        levels = min(8, (args.size & -args.size).bit_length() - 1)      # how often the size halves
        unet = lambda: TextbookUNet(args.ngf, levels, upsample=args.upsample)
        resnet = lambda: textbook_resnet(args.ngf, args.blocks, args.upsample)
        generator = unet if args.generator == "unet" else resnet
        self.args, self.gan = args, functools.partial(textbook_gan_loss, args.gan_loss)
        self.G_AB, self.G_BA = generator(), generator()
        self.D_A, self.D_B = textbook_patchgan(args.ndf), textbook_patchgan(args.ndf)
        self.networks = {"G.AB": self.G_AB, "G.BA": self.G_BA, "D.A": self.D_A, "D.B": self.D_B}
    def load(self, model):
        """Take over the weights of a cyclegan.CycleGAN: the same layers in the same order."""
        for name, network in self.networks.items():
            theirs = list(model.get_submodule(name).state_dict().values())
            network.to(theirs[0])                               # its precision and place
            network.load_state_dict(dict(zip(network.state_dict(), theirs, strict=True)))
        return self
    def generator_loss(self, a, b):
        fake_B, fake_A = self.G_AB(a), self.G_BA(b)
        rec_A, rec_B = self.G_BA(fake_B), self.G_AB(fake_A)
        loss = self.gan(self.D_B(fake_B), True, False) + self.gan(self.D_A(fake_A), True, False)
        loss = loss + self.args.lambda_cycle * (F.l1_loss(rec_A, a) + F.l1_loss(rec_B, b))
        if self.args.lambda_identity:
            idt_A, idt_B = self.G_BA(a), self.G_AB(b)
            idt = F.l1_loss(idt_A, a) + F.l1_loss(idt_B, b)
            loss = loss + self.args.lambda_cycle * self.args.lambda_identity * idt
        return loss, fake_A.detach(), fake_B.detach()
    def discriminator_loss(self, a, b, fake_A, fake_B):
        loss_A = self.gan(self.D_A(a), True, True) + self.gan(self.D_A(fake_A), False, True)
        loss_B = self.gan(self.D_B(b), True, True) + self.gan(self.D_B(fake_B), False, True)
        return loss_A / 2 + loss_B / 2
    def prepare(self):
        self.opt_G, self.opt_D = (torch.optim.Adam([*one.parameters(), *two.parameters()], self.args.lr, (
            self.args.beta1, 0.999)) for one, two in ((self.G_AB, self.G_BA), (self.D_A, self.D_B)))
        self.pool_A, self.pool_B = (cyclegan.ImagePool(self.args.pool_size) for _ in "AB")
        return self
    def step(self, a, b):
        self.D_A.requires_grad_(False), self.D_B.requires_grad_(False)
        self.opt_G.zero_grad()
        loss, fake_A, fake_B = self.generator_loss(a, b)
        loss.backward()
        self.opt_G.step()
        self.D_A.requires_grad_(True), self.D_B.requires_grad_(True)
        self.opt_D.zero_grad()
        self.discriminator_loss(a, b, self.pool_A.query(fake_A), self.pool_B.query(fake_B)).backward()
        self.opt_D.step()
        return loss.detach()

# ---- Helpers ---------------------------------------------------------------------------------------------
def flags(*argv):                               # of a training run on folders that nobody looks into
    return cyclegan.get_args(["--dataA", "a", "--dataB", "b", *" ".join(argv).split()])
def pictures(n, size, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.rand(n, 3, size, size, generator=rng, dtype=dtype) * 2 - 1 for _ in range(2)]
def distance(x, y):                             # ||x - y|| / ||y|| over all tensors together
    x, y = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (x, y))
    return float((x - y).norm() / y.norm())
def fill(folder, n, colour=None, size=(40, 34), seed=0):        # PNGs of noise; on it a coloured square
    rng = os.makedirs(folder, exist_ok=True) or np.random.default_rng(seed)
    for i in range(n):
        image = rng.integers(0, 60, (size[1], size[0], 3)).astype(np.uint8) + 90
        if colour:
            x, y = rng.integers(2, size[0] - 18), rng.integers(2, size[1] - 18)
            image[y:y + 16, x:x + 16] = colour
        Image.fromarray(image).save(f"{folder}/{i:03}.png")
@pytest.fixture(autouse=True, scope="session")
def one_thread():       # these networks are too small for more; processes started here inherit it
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torch.set_num_threads(1)
@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder to work in, with a/ (7 pictures) and b/ (5)."""
    monkeypatch.chdir(tmp_path), fill("a", 7, seed=1), fill("b", 5, seed=2)
    return tmp_path
def run(*argv):                                 # cyclegan.py's main in this process
    return cyclegan.main(" ".join(map(str, argv)).split())
def trainer(words, steps=0):                    # -> model, pools, runtime of a run with these flags
    args = flags(words)
    torch.manual_seed(0)
    model, runtime = cyclegan.CycleGAN(args), cyclegan.Runtime(args)
    runtime.prepare(model, args, steps)
    return model, {name: cyclegan.ImagePool(args.pool_size) for name in "AB"}, runtime

# ---- The mathematics -------------------------------------------------------------------------------------
CHOICES = ("resnet", "unet"), ("deconv", "nearest"), ("lsgan", "bce", "focal", "ghm"), (0, 0.5)
@pytest.mark.parametrize("net, upsample, gan, identity", [*itertools.product(*CHOICES)])
def test_losses_and_gradients_are_the_textbooks(net, upsample, gan, identity):
    args = flags("--size 32 --ngf 3 --ndf 3 --blocks 2 --generator", net, "--upsample", upsample,
                 f"--gan_loss {gan} --lambda_identity {identity}")
    torch.manual_seed(1)
    model = cyclegan.CycleGAN(args).double()
    for p in model.parameters():                        # N(0, 0.02) leaves a net this small too flat to test
        nn.init.normal_(p, 0, 0.2)
    book = Textbook(args).load(model)
    a, b, pool_A, pool_B = *pictures(2, 32), *pictures(2, 32, seed=3)
    loss, terms, fake_A, fake_B = model.generator_loss(a, b)
    book_loss, book_A, book_B = book.generator_loss(a, b)
    assert distance([loss, fake_A, fake_B], [book_loss, book_A, book_B]) < 1e-10
    assert abs(sum(terms.values()) - loss) < 1e-12 and not fake_A.requires_grad
    loss.backward(), book_loss.backward()
    d_loss, d_terms = model.discriminator_loss(a, b, pool_A, pool_B)
    book_loss = book.discriminator_loss(a, b, pool_A, pool_B)
    assert distance([d_loss, d_terms["D_A"] + d_terms["D_B"]], [book_loss, book_loss]) < 1e-10
    assert abs(d_terms["D(real)"] - (book.D_A(a).mean() + book.D_B(b).mean()) / 2) < 1e-10
    for name, network in book.networks.items():
        if name == "D.A":                               # D's gradients come from its own loss alone
            model.D.zero_grad(), book.D_A.zero_grad(), book.D_B.zero_grad()
            d_loss.backward(), book_loss.backward()
        ours, theirs = model.get_submodule(name).parameters(), network.parameters()
        assert distance([p.grad for p in ours], [p.grad for p in theirs]) < 1e-10, name
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("words, bound", [("cpu --amp off", 1e-2), ("cpu --amp bf16", 3e-2), *[pytest.param(
    f"cuda {x}", 3e-2, marks=GPU) for x in ("--amp off", "--amp bf16", "--amp fp16", "--compile on")]])
def test_steps_follow_the_textbook_within_rounding(words, bound):
    """The loss over ten steps. Measured over three seeds, torch 2.15: up to 1e-3 (float32), 3e-3 (bf16)."""
    words, ours, theirs = f"--size 32 --ngf 8 --ndf 8 --blocks 2 --pool_size 0 --device {words}", [], []
    model, pools, runtime = trainer(words)
    book = Textbook(flags(words)).load(model).prepare()
    for i in range(10):
        pair = [x.to(runtime.device) for x in pictures(1, 32, torch.float32, seed=i)]
        terms = cyclegan.train_step(model, pools, runtime, *pair)
        ours.append(sum(terms[k] for k in terms if not k.startswith("D")))
        theirs.append(book.step(*pair))
    assert 0 < distance(ours, theirs) < bound
def test_cudas_autocast_keeps_activations_in_bf16():       # on tensors without values, so it needs no GPU
    dtypes, hook = [], nn.modules.module.register_module_forward_hook(lambda _, x, y: dtypes.append(y.dtype))
    with hook, torch._subclasses.FakeTensorMode(), torch.device("cuda"):
        model = cyclegan.CycleGAN(flags(*SMALL))
        torch.set_autocast_enabled("cuda", True), torch.set_autocast_dtype("cuda", torch.bfloat16)
        loss = model.generator_loss(*torch.zeros(2, 1, 3, 32, 32))[0]
    torch.set_autocast_enabled("cuda", False)
    assert {*dtypes} == {torch.bfloat16} and loss.dtype == torch.float32
def test_identity_gets_pictures_of_its_own_domain():
    """G_AB is to leave B alone and G_BA A, not the other way round: stubs whose effects can be told apart."""
    Add = lambda value: setattr(stub := nn.Identity(), "forward", lambda x: x + value) or stub
    model = cyclegan.CycleGAN(flags("--size 32 --ngf 1 --ndf 1 --blocks 0"))
    model.G["AB"], model.G["BA"] = Add(0.25), Add(0.75)
    _, terms, fake_A, fake_B = model.generator_loss(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32))
    assert terms["idt_B"] == 5 * 0.25 and terms["idt_A"] == 5 * 0.75          # 10 * 0.5 * what the stub adds
    assert terms["cycle_A"] == 10 * 1.0 and terms["cycle_B"] == 10 * 1.0
    assert (fake_B == 0.25).all() and (fake_A == 1.75).all()
def test_gradients_do_not_depend_on_the_memory_layout():        # as with nn.InstanceNorm2d they do
    model, pair = cyclegan.CycleGAN(flags("--size 32 --ngf 4 --ndf 4 --blocks 1")).double(), pictures(1, 32)
    model.generator_loss(*pair)[0].backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(), model.to(memory_format=torch.channels_last)
    model.generator_loss(*(x.contiguous(memory_format=torch.channels_last) for x in pair))[0].backward()
    assert distance([p.grad for p in model.parameters()], plain) < 1e-10

# ---- The networks ----------------------------------------------------------------------------------------
def test_numbers_of_parameters():
    for network, words, n in [("ResNetGenerator", "", 11378179), ("ResNetGenerator", "--blocks 6", 7837699),
                              ("UNetGenerator", "", 54409603), ("PatchDiscriminator", "", 2764737)]:
        assert sum(p.numel() for p in getattr(cyclegan, network)(flags(words)).parameters()) == n
    assert flags("").blocks == 9 and flags("--size 128").blocks == 6
    kernels = [p.detach() for p in cyclegan.CycleGAN(flags("--size 64")).parameters() if p.ndim == 4]
    assert abs((w := torch.cat([p.flatten() for p in kernels])).std() - 0.02) < 1e-4 and abs(w.mean()) < 1e-4
def test_a_score_sees_70_pixels():
    layers = cyclegan.PatchDiscriminator(flags("--ndf 2"))      # without its norms, which see everything
    x = torch.rand(1, 3, 256, 256, requires_grad=True)
    network = nn.Sequential(*[y for y in layers if not isinstance(y, cyclegan.InstanceNorm)])
    network(x)[0, 0, 15, 15].backward()
    seen = x.grad.abs().sum((0, 1))
    assert (seen.sum(0) > 0).sum() == 70 and (seen.sum(1) > 0).sum() == 70
@pytest.mark.parametrize("generator, size", [*itertools.product(("resnet", "unet"), (32, 64, 96, 160))])
def test_shapes(generator, size):
    model = cyclegan.CycleGAN(flags(f"--generator {generator} --size {size} --ngf 2 --ndf 2 --blocks 1"))
    y = model.G.AB(x := torch.rand(2, 3, size, size))
    assert y.shape == x.shape and y.abs().max() <= 1
    assert model.D.A(x).shape == (2, 1, size // 8 - 2, size // 8 - 2)
def test_image_pool():
    torch.manual_seed(0)
    off, x = cyclegan.ImagePool(0), torch.rand(2, 3, 4, 4)
    assert torch.equal(off.query(x), x) and not off.images
    pool, new = cyclegan.ImagePool(3), lambda *values: torch.tensor(values).float().view(-1, 1, 1, 1)
    for i in range(3):                                  # filling: what comes goes
        assert pool.query(x := new(i)) == i and len(pool.images) == i + 1
        x += 100                                        # the pool keeps a copy
    held, swaps = {0, 1, 2}, 0
    for i in range(3, 2003):
        if (out := pool.query(new(i)).item()) != i:     # an old one comes out, the new one takes its place
            assert out in held
            held, swaps = held - {out} | {i}, swaps + 1
        assert {image.item() for image in pool.images} == held
    assert 900 < swaps < 1100                           # probability 1/2
    pool.query(x := new(*range(9999, 10009)))           # per picture, not per batch
    assert 0 < (pool.query(x + 10) == x + 10).sum() < 10
def test_the_rate():
    args = flags("--epochs 3 --epochs_decay 2 --lr 0.5")
    rate = [cyclegan.lr_at(step, args, epoch_steps=10) for step in range(50)]
    assert [rate[k] for k in (0, 29, 30, 40)] == [0.5, 0.5, 0.5, 0.25]      # constant, decaying, half way
    assert rate[49] == pytest.approx(0.5 / 20) and all(x > y for x, y in zip(rate[30:], rate[31:]))
    assert cyclegan.lr_at(7, flags("--epochs 1 --epochs_decay 0"), 8) == 2e-4

# ---- Training --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("generator, upsample, gan, identity, pool", [*itertools.product(*CHOICES, (0, 50))])
def test_every_combination_of_flags_takes_a_step_downhill(generator, upsample, gan, identity, pool):
    words = f"--generator {generator} --upsample {upsample} --gan_loss {gan} --lambda_identity {identity}"
    words += f" --pool_size {pool} --size 32 --ngf 4 --ndf 8 --blocks 1 --device cpu --amp off"
    model, pools, runtime = trainer(words)
    a, b = pictures(2, 32, torch.float32)
    terms = cyclegan.train_step(model, pools, runtime, a, b)
    assert list(terms) == ["adv_AB", "adv_BA", "cycle_A", "cycle_B"] + ["idt_A", "idt_B"] * bool(identity) + [
        "D_A", "D_B", "D(real)", "D(fake)"] and all(p.grad is None for p in model.parameters())
    loss, _, fake_A, fake_B = model.generator_loss(a, b)
    runtime.update("G", loss)
    assert model.generator_loss(a, b)[0] < loss
    loss, _ = model.discriminator_loss(a, b, fake_A, fake_B)
    runtime.update("D", loss)
    assert model.discriminator_loss(a, b, fake_A, fake_B)[0] < loss
def test_red_squares_become_blue(data):         # the whole program in seconds
    fill("red", 30, (230, 30, 30), seed=1), fill("blue", 30, (30, 30, 230), seed=2)
    run("--dataA red --dataB blue --out_dir x --size 32 --load_size 32 --ngf 8 --ndf 8 --blocks 1 --lr 2e-3",
        "--upsample nearest --batch_size 4 --max_steps 220 --device cpu --amp off --log_every 110")
    run("--mode translate --checkpoint x/generators.pt --input red --output out --device cpu")
    for i in range(4):
        before = Image.open(f"red/{i:03}.png").resize((32, 32), Image.Resampling.BICUBIC)
        before, after = (np.asarray(image).astype(int) for image in (before, Image.open(f"out/{i:03}.png")))
        square = before[..., 0] > 210
        assert (after[square][:, 2] > after[square][:, 0] + 60).mean() > 0.9, "red squares are blue"
        assert np.abs(after - before)[~square].mean() < 45, "and the rest is as it was"
def test_what_a_run_writes(data, capsys):
    words = "--pool_size 3 --batch_size 2 --log_every 3 --sample_every 4 --save_every 5 --max_steps 11"
    assert run("--dataA a --dataB b --out_dir x", words, *SMALL) == signal.getsignal(signal.SIGTERM) == 0
    state, shared = (torch.load(f"x/{name}.pt", weights_only=True) for name in ("latest", "generators"))
    assert state["step"] == 11 and state["epoch"] == 2 and state["pairs"] == 22         # epochs of 4 steps
    assert shared["model"].keys() == {key for key in state["model"] if key.startswith("G.")}
    lines = [line.rstrip().split(",") for line in open("x/log.csv")]
    assert [line[0] for line in lines] == ["step", "3", "4", "5", "6", "8", "9", "10", "11"]
    assert len(lines[0]) == len(lines[1]) == 15 and {"cycle_A", "idt_B", "D(fake)", "rate"} < set(lines[0])
    assert {*os.listdir("x")} == {"generators.pt", "latest.pt", "log.csv", "samples"}
    assert sorted(os.listdir("x/samples")) == [f"step_{i:07}.png" for i in (4, 8, 11)]
    assert Image.open("x/samples/step_0000011.png").size == (6 * 34 + 2, 6 * 34 + 2)
    assert re.search("(?s)batch 2, rate 0.0002\n.*step 3/11.*waiting.*to go", capsys.readouterr().out)
    os.remove("x/latest.pt"), pytest.raises(SystemExit, run, "--dataA a --dataB b --out_dir x", *SMALL)
def test_compiled_networks_give_the_same_and_save_the_same(data, monkeypatch):
    """With a cheap backend: whole networks, one graph for each kind of call; compiling a fifth one fails."""
    graphs, real, eager = [], nn.Module.compile, torch._dynamo.lookup_backend("aot_eager")
    count = torch._dynamo.reset() or (lambda *graph: graphs.append(graph) or graphs[4:] or eager(*graph))
    monkeypatch.setattr(nn.Module, "compile", lambda net, **kinds: real(net, backend=count, **kinds))
    for compiled in ("on", "off"):
        run("--dataA a --dataB b --max_steps 2 --amp off --compile", compiled, "--out_dir", compiled, *SMALL)
    on, off = (torch.load(f"{name}/generators.pt", weights_only=True)["model"] for name in ("on", "off"))
    assert len(graphs) == 4 and on.keys() == off.keys()     # G: with identity or without; D: frozen or not
    assert distance(*([net[key] for key in on if on[key].ndim == 4] for net in (on, off))) < 1e-3   # kernels
    torch._dynamo.reset(), pytest.raises(RuntimeError, run, "--resume on --max_steps 3")    # not silently off
    run("--resume on --compile off --max_steps 3")

# ---- Runs that stop and go on, alone and as two processes -------------------------------------------------
FORK = multiprocessing.get_context("forkserver")        # imports torch once, before any thread and any CUDA
FORK.set_forkserver_preload(["cyclegan", __name__])
TINY = ("--dataA a --dataB b --out_dir run --device cpu --amp off --size 32 --load_size 36 --ngf 2 --ndf 2 "
        "--blocks 1 --pool_size 3 --log_every 2 --sample_every 5 --save_every 4 --epochs 1 --epochs_decay 2")
ACTS = {  # signals go to the whole group, as from a terminal, `timeout`, SLURM
    "TERM": lambda *_: os.killpg(0, signal.SIGTERM), "INT": lambda *_: os.killpg(0, signal.SIGINT),
    "KILL": lambda *_: os.killpg(0, signal.SIGKILL), "bug": lambda *_: 1 / 0, "end": lambda *_: os._exit(0),
    "full": lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)),   # a write fails half-way
    "refuse": lambda _, path: path == "run/latest.pt" and os.path.exists(path) and os.listdir("nowhere"),
    "log": lambda *_: [os.remove("run/log.csv"), os.mkdir("run/log.csv")],
    "tee": lambda *_: [os.dup2(end, 1) if i else os.close(end) for i, end in enumerate(os.pipe())],  # is gone
    "nan": lambda *args: args[3].fill_(float("nan")), "heap": lambda *_: torch.empty(1 << 60),
    "sum": lambda model, *_: print(sum(p.double().sum().item() for p in model.parameters()), "=", flush=True)}
def hook(name, n, act):
    """Let call number n (0: every call) of cyclegan.<name> begin with an act, which gets its arguments."""
    *path, last = name.split(".")
    owner, calls = functools.reduce(getattr, path, cyclegan), itertools.count(1)
    def new(*args, old=getattr(owner, last), **named):
        int(n) in (0, next(calls)) and ACTS[act](*args)
        return old(*args, **named)
    setattr(owner, last, new)
def child(work, flags, hooks, folder, **env):
    """A process: work(flags), or the program itself, in a folder, its output in the file out<RANK> there."""
    os.chdir(folder), os.setpgrp(), torch.set_num_threads(1), os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)            # not again for the loader's workers
    out = open(f"out{env['RANK']}", "wb", buffering=0)
    os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2), [hook(*each.split()) for each in hooks.split(",")]
    try:
        code = (work or cyclegan.main)(flags.split())
    except SystemExit as error:                         # as at the top level: its frames go before the exit
        code = error.code
    raise SystemExit(code)
@pytest.fixture
def go(tmp_path, monkeypatch):
    """go(flags) in n processes -> exit codes and outputs, of one or of all. 7 steps an epoch; for n=2, 4."""
    monkeypatch.chdir(tmp_path), os.mkdir("a"), os.mkdir("b")
    [Image.linear_gradient("L").rotate(31 * i).save(f"{'ab'[i > 4]}/{i}.png") for i in range(12)]
    def go(flags, hooks="train_step 99 bug", rank1="", n=1, work=None):
        port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n))
        parts = [FORK.Process(target=child, args=(work, flags, rank and rank1 or hooks, tmp_path),
                              kwargs=dict(env, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(n)]
        [part.start() for part in parts], [part.join(30) for part in parts], [part.kill() for part in parts]
        codes, texts = [part.exitcode for part in parts], [open(f"out{rank}").read() for rank in range(n)]
        assert 1 in codes or "Traceback" not in "".join(texts), texts
        return (codes, texts) if n > 1 else (codes[0], texts[0])
    return go
def state(folder):
    """A run's checkpoint without flags and log; the rows of log.csv by step, without their timing columns."""
    state = cyclegan.load_checkpoint(folder) | {"args": None, "rows": None}
    rows = {line.split(",")[0]: line.rsplit(",", 2)[0] for line in open(f"{folder}/log.csv")}
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: (x.dtype, x.tolist()), state), rows
@pytest.mark.parametrize("flags", ["--workers 0", "--workers 2", "--workers 0 --amp fp16"])
def test_stopped_and_killed_anywhere_a_run_ends_as_one_that_never_stopped(go, flags):
    assert go(f"{TINY} {flags} --out_dir whole")[0] == 0
    code, text = go(f"{TINY} {flags}", "train_step 3 TERM")
    assert code == 143 and text.endswith("step 3, saved; to go on: python cyclegan.py --resume run\n")
    for act in ("train_step 3 KILL", "torch.save 1 KILL", "os.replace 2 KILL", "save_png 2 KILL"):
        assert go("--resume run", act)[0] == -9
    assert go("--resume run", "train_step 4 INT")[0] == 130 and go("--resume run")[0] == 0
    (whole, rows), (end, found) = state("whole"), state("run")
    assert whole == end and whole["step"] == 21 and len(whole["ranks"][0]["A"]) == 3
    assert len(rows) == 13 and sum(rows[step] != found[step] for step in rows) <= 2     # that a stop divided
@pytest.mark.parametrize("act, code, step", [("INT", -2, 4), ("TERM", 143, 8)])
def test_a_second_ctrl_c_ends_at_once_but_a_second_sigterm_does_not(go, act, code, step):
    assert go(TINY, f"torch.save 5 {act},torch.save 5 {act}")[0] == code and state("run")[0]["step"] == step
    assert go("--resume run")[0] == 0 and not [name for name in os.listdir("run") if name.endswith(".part")]
@pytest.mark.parametrize("act, named, step", [("6 full", ".pt", 4), ("6 log", "log.csv", 4), ("6 nan",
    "step 6: adv", 4), ("6 heap", "out of memory", 4), ("1 sum,os.replace 0 refuse", "run/latest.pt", 0),
    ("3 tee,train_step 3 INT", "Broken pipe", 3)])
def test_what_stops_a_run_is_one_line_and_the_last_checkpoint_is_kept(go, act, named, step):
    code, text = go(f"{TINY} --workers 1", f"train_step {act}")
    assert code == 2 and (last := text.splitlines()[-1]).startswith("cyclegan.py: ") and named in last, text
    assert cyclegan.load_checkpoint("run")["step"] == step and not os.path.exists("run/latest.pt.part")
def test_a_bug_ends_the_run_and_its_workers(go):
    assert go(f"{TINY} --workers 2", "train_step 3 bug,signal.alarm 0 end")[0] == 1
def test_a_finished_run_goes_on_for_more_epochs_in_another_place_and_precision(go):
    assert go(f"{TINY} --amp bf16")[0] == 0
    code, text = go("--resume run/latest.pt --out_dir run/")
    assert (code, text) == (0, "run is finished, 21 steps; for more, raise --epochs or --max_steps\n")
    [os.rename(old, new) for old, new in (("run", "moved"), ("a", "a2"), ("b", "b2"))]
    for n, flags in enumerate(["--amp off --compile off", "--amp fp16", "--load_size 40 --workers 1"], 3):
        assert go(f"--resume moved --dataA a2 --dataB b2 --epochs_decay {n} --log_every 1 {flags}")[0] == 0
    rates = [(int(row.split(",")[0]), float(row.split(",")[2])) for row in [*open("moved/log.csv")][-7:]]
    assert rates == [(step + 1, pytest.approx(2e-4 * (1 - (step - 7) / 35))) for step in range(35, 42)]
def by_hand(flags):     # five steps in float64; then three updates, the second of which overflows in rank 1
    torch.manual_seed(0)
    args = cyclegan.get_args(flags)
    runtime, model = cyclegan.Runtime(args), cyclegan.CycleGAN(args).double()
    runtime.prepare(model, args, 5), setattr(runtime, "autocast", contextlib.nullcontext)
    *batches, last = torch.rand(6, 2, 2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    for pair in batches:
        mine = pair[:, runtime.rank::runtime.world]
        cyclegan.train_step(model, dict.fromkeys("AB", cyclegan.ImagePool(0)), runtime, *mine)
    nets = [*model.G.values(), *model.D.values()]       # outputs: biases before a norm are rounding noise
    torch.save(torch.cat([net(last[0]).flatten() for net in nets]), f"{runtime.world}{runtime.rank}")
    for factor in (1, float("inf") if runtime.rank else 1, 1):
        runtime.update("G", sum(p.square().sum() for p in model.G.parameters()) * factor)
        ACTS["sum"](model), print(runtime.scaler.get_scale())
def test_two_processes_step_as_one_with_twice_the_batch_and_skip_an_overflow_together(go):
    _, (codes, (text, other)) = (go(f"{TINY} --amp fp16", work=by_hand, n=n) for n in (1, 2))
    one, *two = [torch.load(name) for name in ("10", "20", "21")]
    assert torch.equal(*two) and ((one - two[0]).norm() / one.norm()).item() < 1e-10
    moved, scale, skipped, lower, again, _ = text.splitlines()
    assert codes == [0, 0] and text == other and moved == skipped != again and float(lower) < float(scale)
def test_each_item_is_dealt_to_one_of_the_processes_and_all_in_an_epoch(go):
    data, shares = cyclegan.UnpairedImages(cyclegan.get_args(TINY.split()), step_pairs=2), []
    for rank in (0, 1):
        runtime = types.SimpleNamespace(rank=rank, world=2, local_world=2, device=torch.device("cpu"))
        shares += [n for batch in cyclegan.make_loader(data, range(4), runtime).batch_sampler for n in batch]
    one, two = [[data.deal(1, epoch, i, augment=False).sum().item() for i in range(7)] for epoch in (0, 1)]
    assert sorted(shares) == [*range(8)] and data.epoch_pairs == 8
    assert one != two and sorted(one) == sorted(two) and len({*one}) == 7
def test_two_processes_stay_equal_stop_together_and_go_on_exactly(go):
    codes, (text, other) = go(f"{TINY} --out_dir whole", "train_step 0 sum", n=2)
    sums = [line for line in text.splitlines() if line.endswith("=")]
    assert codes == [0, 0] and other.splitlines() == sums and len({*sums}) == 12    # rank 1 says nothing else
    codes, (text, other) = go(TINY, rank1="train_step 3 TERM", n=2)
    assert codes == [143, 143] and text.count("stopped at step 3, saved") == 1 and not other
    shutil.copytree("run", "alone"), shutil.copytree("run", "bad")
    assert go("--resume run", n=2)[0] == [0, 0]
    assert (whole := state("whole")[0]) == state("run")[0] and whole["step"] == 12
    assert whole["ranks"][0]["A"] != whole["ranks"][1]["A"]
    assert re.match("2 processes before, 1 now\n.* 15 to go", go("--resume alone")[1])      # of 21 steps
    assert go("--resume bad", rank1="train_step 1 nan", n=2)[0] == [2, 2] and state("bad")[0]["step"] == 3
    codes, (text, _) = go("--resume bad", rank1="train_step 3 KILL", n=2)
    assert codes == [2, -9] and "cyclegan.py: lost the other processes" in text.splitlines()[-1]
def test_two_processes_translate_every_file_once(go):
    assert go(f"{TINY} --max_steps 1")[0] == 0
    codes, texts = go("--mode translate --checkpoint run/generators.pt --input b --output to --device cpu",
                       "translate_any 0 sum", n=2)
    assert codes == [0, 0] and sorted(text.count("=") for text in texts) == [3, 4]
    assert len(os.listdir("to")) == 7 and "translated 7 of 7" in texts[0] and "translated" not in texts[1]
def test_a_checkpoint_made_on_a_gpu_goes_on_without_one(data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")          # as if made there
        run("--dataA a --dataB b --out_dir x --max_steps 2", *SMALL)
    assert b"cuda:0" in pathlib.Path("x/latest.pt").read_bytes()
    for words in "--max_steps 3 --lambda_identity 0", "--max_steps 4 --lambda_identity 1":
        assert not run("--resume x", words)                 # and two columns go, and come again
    assert [row.count(",") for row in open("x/log.csv")] == [14, 14, 12, 12, 14, 14]
@GPU
def test_from_a_gpu_to_the_cpu_and_back(data):
    run("--dataA a --dataB b --out_dir x --max_steps 3", *SMALL, "--device cuda --workers 2")
    run("--resume x --device cpu --max_steps 5"), run("--resume x --device cuda --compile on --max_steps 7")
    assert cyclegan.load_checkpoint("x")["step"] == 7

# ---- Pictures, bad input, translating ---------------------------------------------------------------------
TRAIN = " ".join(SMALL) + " --native --round_trip --dataA {0}/A --dataB {0}/B "     # not to act later on
TO = "--mode translate --device cpu --checkpoint "
BROKEN = [f"C/bad/{name}" for name in ("cut.jpg", "cut.png", "cut.webp", "lfs.jpg", "page.jpg", "zero.jpg")]
JUNK = dict(zip(BROKEN[3:], (b"version https://git-lfs.github.com/spec/v1", b"<html>", b""))) | {"half": {},
    "list": pickle.dumps([1], 2), "keys": {1: 2, "x.weight": 3}, "args": {"args": {"generator": "x"}},
    "vgg": {f"{i}.weight": torch.ones(8, 8 if i else 3, 3, 3) for i in range(9)}, "module": nn.ReLU(),
    "blur": textbook_resnet(4, 1).state_dict() | {"f": torch.ones(3, 3)}}       # saved by torch, if not bytes
def picture(path, size=(40, 36)):               # of smooth noise; makes its folders
    os.makedirs(os.path.dirname(path), exist_ok=True)
    noise = Image.frombytes("RGB", (6, 5), bytes(k**3 % 251 for k in range(90)))
    return noise.resize(size).save(path) or path
@pytest.fixture(scope="module")
def w(tmp_path_factory):                # folders A, B, void, C with bad in it; JUNK; runs resnet and unet
    w = tmp_path_factory.mktemp("w")
    [picture(f"{w}/{x}") for x in ("A/0.png", "A/1.png", "B/2.png", "C/3.png", *BROKEN)], (w / "void").mkdir()
    [(w / x).write_bytes(y) if isinstance(y, bytes) else torch.save(y, w / x) for x, y in JUNK.items()]
    [os.truncate(w / x, os.path.getsize(w / x) // 2) for x in ("half", *BROKEN[:3])]
    [run(TRAIN.format(w), f"--out_dir {w}/{x} --generator {x} --max_steps 2") for x in ("resnet", "unet")]
    return w
flat, RED, EXIF, KEY = lambda mode, c: Image.new(mode, (9, 9), c), (255, 0, 0), Image.Exif(), "transparency"
LUT, CORNER = flat("RGB", (10, 200, 30)).quantize(2), np.uint8([RED, (0, 0, 0)]).repeat(16, 0).repeat(16, 1)
TURNED = [x[..., None] for a in (CORNER, CORNER.T) for x in (a, a[:, ::-1], a[::-1, ::-1], a[::-1])]
@pytest.mark.parametrize("ext, image, rgb, options", [(*case, {})[:4] for case in [
    *[(x[:3], flat(x[4:], 32768), 128) for x in ("png I;16", "pgm I;16", "tif I;16", "tif I;16B", "tif I")],
    ("tif", flat("LAB", (128,) * 3), 119), ("png", flat("1", 1), 255), ("png", flat("LA", (0, 128)), 127),
    ("jpg", flat("CMYK", (0, 255, 255, 0)), RED), ("png", flat("RGBA", (*RED, 128)), (255, 127, 127)),
    ("webp", flat("RGBA", (9, 9, 9, 0)), 255, {"lossless": True}), ("png", flat("RGB", RED), 255, {KEY: RED}),
    ("png", LUT, (132, 227, 142), {KEY: b"\x80"}), ("png", LUT, (10, 200, 30)), ("gif", LUT, 255, {KEY: 0}),
    *[(x, flat("RGB", RED), RED, {"save_all": True, "append_images": [LUT]}) for x in ("gif", "png", "webp")],
    *[(x, Image.fromarray(CORNER).convert("RGB"), upright, {"exif": EXIF.tobytes(), "lossless": True})
      for x in ("jpg", "png", "webp", "tif") for EXIF[0x112], upright in enumerate(TURNED, start=1)]]])
def test_read_image(tmp_path, ext, image, rgb, options):
    image.save(tmp_path / f"x.{ext}", **options)
    read = cyclegan.read_image(tmp_path / f"x.{ext}")
    assert read.mode == "RGB" and np.abs(np.array(read, int) - rgb).max() <= 2
def test_find_images_and_large_ones(tmp_path, capsys, monkeypatch):
    names, real = ["A B.JPG", "sub/deep/x.webp", "x.jpg", "ünï ☃.jpeg"], os.scandir
    for name in [*names, "._x.jpg", ".git/x.jpg", "run/x.jpg", "locked/x.jpg", "y.txt.png/Thumbs.db.gif"]:
        path = picture(f"{tmp_path}/{name}", (800, 600))
    os.rename(path, path[:-4]), os.symlink("..", tmp_path / "sub/loop"), os.mknod(tmp_path / "run/latest.pt")
    monkeypatch.setattr(os, "scandir", lambda top: real(top + "/x.jpg" * top.endswith("/locked")))     # fails
    assert cyclegan.find_images(str(tmp_path)) == names and "/locked" in capsys.readouterr().err
    assert cyclegan.read_image(f"{tmp_path}/x.jpg", 70).size == (100, 75)                     # decoded small
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)
    with pytest.raises(OSError, match=f"{tmp_path}/x.jpg[^\n]*exceeds limit"):
        cyclegan.read_image(f"{tmp_path}/x.jpg", 70)
@pytest.mark.parametrize("size", [(180, 220), (80, 60), (36, 36), (500, 40), (1, 1), (3, 5000)])
def test_fit(tmp_path, size):
    image, old = Image.open(picture(f"{tmp_path}/x.png", size)), np.array(size)
    for resize, side in ("stretch", old), ("crop", old.min()):
        args, box = flags(*SMALL, "--resize", resize), (*(old - side) / 2, *(old + side) / 2)
        assert np.array_equal(cyclegan.fit(image, args).permute(1, 2, 0), image.resize((32, 32), box=box))
        two, spare = np.array(image.resize((36 * old // side).tolist()), int), 36 * old / side - 32
        for x, y, mirror in (0, 0, 1), (*spare.astype(int), -1), (1, 3, 1):     # in two steps: resize, crop
            dice = argparse.Namespace(random=lambda n=0: np.array([x, y]) / spare if n else mirror)
            one = cyclegan.fit(image, args, dice).permute(1, 2, 0).numpy()[:, ::mirror]
            assert np.abs(one - two[y:y + 32, x:x + 32]).max() <= 2
TEXT = "out_dir resume device dataA dataB checkpoint input output truth".split()
COUNTS = "load_size size ngf ndf max_steps batch_size log_every sample_every save_every".split()
@pytest.mark.parametrize("argv, word", [("", "--dataA"), ("--dataA x", "--dataB"), *[(
    f"--{x}{y}", f"--{x}") for x in vars(flags()) for y in (             # every flag there is
        [""] if x in TEXT else "= =x =-1 =nan =inf =1e30 =9999999999999".split())],
    *[(f"--{x}={y}", f"--{x}") for x in COUNTS for y in ("0", "1.5")], (TRAIN + "--dataB {0}", "/A/0."),
    (TRAIN + "--epochs 0 --epochs_decay 0", "--epochs"), ("--resume {0}/resnet --dataA {0}/C", "--dataA"),
    ("--resume {0}/unet/generators.pt", "--mode translate"), *[(TRAIN + x, x.split(" --")[0]) for x in (
        "--bogus", "--size 34", "--size 48 --load_size 60 --generator unet", "--load_size 35 --size 36",
        "--ngf 3 --resume {0}/resnet", "--device 0", "--device cuda:99", "--device hpu", "--device meta")],
    *[(f"{TRAIN}--{x}", x.split()[-1]) for x in (
        "dataA {0}/none", "dataB {0}/void", "out_dir {0}/unet", "out_dir {0}/list/x")],
    *[(f"{TO}{{0}}/unet --output o --input {{0}}/{x}", x.split()[-1]) for x in ("none", "void",
        "A --output {0}/A", "A --output {0}/list/x", "A --truth {0}/none", "A --truth {0}/B",
        "A --truth {0}/B --output {0}/B/")],
    *[(x + "{0}/" + y, y) for x in ("--resume ", "--input {0}/A --output o " + TO) for y in ("void", *JUNK)]])
def test_bad_input(w, tmp_path, capsys, monkeypatch, argv, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(argv.format(w))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and word.format(w) in lines[0] and len(lines[0]) < 300 and not os.listdir(), lines
@pytest.mark.parametrize("workers, top", [(0, "C"), (2, "C"), (0, "C/bad")])
def test_broken_in_training(w, tmp_path, capfd, workers, top):
    with contextlib.nullcontext() if top == "C" else pytest.raises(SystemExit, match="2"):
        run(TRAIN.format(w), f"--dataA {w}/{top} --out_dir {tmp_path} --max_steps 14 --workers {workers}")
    assert sorted(re.findall(f"{w}/(C/bad/[a-z.]+):", err := capfd.readouterr().err)) == BROKEN   # each once
    assert ("--dataA" in err.splitlines()[-1]) == (top == "C/bad")
@pytest.mark.parametrize("path, turn", [("resnet/generators.pt", 1), ("resnet/latest.pt", -1), ("unet", -1)])
def test_translate(w, tmp_path, capsys, path, turn):
    px = {"s/ü": (1, 1), "s/ü.png": (7, 5), "y": (33, 50), "y_back.jpg": (9, 7), "a.b": (3, 9), "3": (40, 36)}
    files, ways = ["s/ü.jpg", "s/ü.png", "y.webp", "y_back.jpg", "a.b.bmp"], ["AtoB", "BtoA"][::turn]
    [picture(f"{tmp_path}/in/{x}", size) for x, size in zip(files, px.values())]
    argv = f"{TO}{w}/{path} --input {tmp_path}/in {w}/C/3.png {w}/C/bad --round_trip --direction {ways[0]}"
    for top, more, side in ("o", "", 32), ("p", "--size 64 --resize crop", 64), ("in/q", "--native", 0):
        assert run(argv, more, "--output", top := tmp_path / top) == 1                  # as some are broken
        assert re.findall("6 of 12|C/bad/[a-z.]+(?=:)", "".join(capsys.readouterr())) == ["6 of 12", *BROKEN]
        assert {x: Image.open(x).size for x in top.rglob("*.*")} == {top / f"{x}{end}.png": (
            side or a, side or b) for x, (a, b) in px.items() for end in ("", "_back")}
    x = cyclegan.fit(Image.open(w / "C/3.png"), flags(*SMALL))[None] / 127.5 - 1
    for way, y in zip(ways, ("o/3.png", "o/3_back.png")):
        x = cyclegan.load_generator(w / path.split("/")[0] / "generators.pt", way)[0](x).detach()
        assert abs(np.array(Image.open(tmp_path / y)) - 127.5 * (x[0].movedim(0, 2).numpy() + 1)).max() <= 1
def test_truth(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cyclegan, "load_generator", lambda *_: (nn.Identity(), {}))
    monkeypatch.setattr(cyclegan, "translate_any", lambda G, x: x + 0.1)
    words = "x --input {0}/x --output {0}/o --native --truth {0}/t".format(tmp_path)
    band = Image.fromarray(np.uint8([[102], [153]]).repeat(64, 0))          # a step by 0.4, of -1 to 1
    for n, *said in (16, .15, 21.2, .3, 75, .1), (64, .3, 16.5, .3, 75, 0), (0, .1, 26, 0, 0, .1):
        [band.crop((0, k, 1, 64 + k)).save(picture(f"{tmp_path}/{x}/1.bmp")) for x, k in (("x", 0), ("t", n))]
        assert not run(TO, words)
        assert [*map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out.split("compared")[1]))] == said
    assert run(TO, words, "--truth", picture(f"{tmp_path}/u/1.bmp")[:-6])   # of another size: not compared
    assert "translated 1 of 1" in (said := "".join(capsys.readouterr())) and "compared" not in said
@pytest.mark.parametrize("kind", ["resnet", "old", "nearest", "down_blocks", "unet"])
def test_foreign_checkpoints(tmp_path, kind):   # official, its first, PyTorch-GAN's, the CelebA book's, U-Net
    net = TextbookUNet(4, 5) if kind == "unet" else textbook_resnet(4, 2, kind)
    for i in (4, 7) if kind == "down_blocks" else ():
        net[i].padding, net[i] = (0, 0), nn.Sequential(nn.ReflectionPad2d(1), net[i])
    ends = ["", ".running_mean", ".running_var", ".num_batches_tracked"][:4 if kind == "old" else 1]
    torch.save({f"{kind}.{k}{end}": v for k, v in net.state_dict().items() for end in ends}, tmp_path / "G")
    x, G = pictures(2, 64)[0], cyclegan.load_generator(tmp_path / "G", "AtoB")[0].double()
    assert distance([G(x)], [net.double()(x)]) < 1e-9 and G(x).std() > 0.1

# ---- CelebA -----------------------------------------------------------------------------------------------
# Ten pictures: 1-4 are black, 4-8 blond (4 is both), 9 and 10 neither; 3 and 6 have glasses; even ones male.
CELEBA_TXT = "10\r\nBlack_Hair Blond_Hair Eyeglasses Male\r\n" + "".join(
    "%06d.jpg %2d %2d %2d %2d\r\n" % (i, *(2 * x - 1 for x in (i < 5, 3 < i < 9, i in (3, 6), i % 2 == 0)))
    for i in range(1, 11))
CELEBA_CSV = "image_id," + CELEBA_TXT[4:].replace("\r", "").replace("  ", " ").replace(" ", ",")
CELEBA_LIST, CELEBA_DIR = "files/list_attr_celeba.csv", "files/img_align_celeba"
@pytest.fixture
def celeba_files(tmp_path, monkeypatch):                # a list, a folder, and both in a zip
    os.makedirs(tmp_path / "a/b" / CELEBA_DIR)
    monkeypatch.chdir(tmp_path / "a/b")
    pathlib.Path(CELEBA_LIST).write_text(CELEBA_CSV)
    with zipfile.ZipFile("z.zip", "w") as archive:
        archive.writestr("bbox.csv", "other"), archive.write(CELEBA_LIST, "attr.csv")
        for i in range(11):
            pathlib.Path(CELEBA_DIR, f"{i:06}.jpg").write_bytes(b"%d." % i * i)
            archive.writestr(["../", "../../", "/", "", "x/x/"][min(i, 4)] + f"{i:06}.jpg", b"%d." % i * i)
def celeba_tree(folders="black blond"):                     # the numbers of each folder's whole pictures
    return [[int(p.stem) for p in sorted(pathlib.Path("files", name).iterdir())
             if p.read_bytes() == b"%d." % int(p.stem) * int(p.stem)] for name in folders.split()]
def celeba_stamps():
    return {p: (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in pathlib.Path("files").rglob("*")}
@pytest.mark.parametrize("link, call, form, text", [        # fails: as between two disks
    ("hard", "replace", "csv", CELEBA_CSV), ("symlink", "replace", "csv", CELEBA_CSV.replace("-1", "0")),
    ("move", "replace", "txt", CELEBA_TXT), ("move", "remove", "txt", CELEBA_TXT[4:]),
    ("copy", "replace", "zip", ""), ("fails", "replace", "csv", CELEBA_CSV.replace("\n", "\r\n"))])
def test_prepare_lists_and_links(celeba_files, monkeypatch, capsys, link, call, form, text):
    os.remove(CELEBA_LIST), pathlib.Path("files/list_attr_celeba." + form).write_bytes(text.encode())
    flags = ["--link", link] * (link != "fails") + ["--attributes", "z.zip"] * (form == "zip")
    monkeypatch.setattr(os, "link", os.link if link != "fails" else lambda *args: os.readlink("files"))
    real, turns = getattr(os, call), iter([1, 1])
    with monkeypatch.context() as patch, pytest.raises(StopIteration):      # stopped at the third picture
        patch.setattr(os, call, lambda *args: next(turns) and real(*args))
        prepare_celeba.main(flags)
    [pathlib.Path("files/blond", name).write_bytes(b"half") for name in ("000007.jpg", "000008.jpg.part")]
    prepare_celeba.main(flags)                              # the next run finishes it
    assert "Black_Hair: 4\nBlond_Hair: 4\nboth (kept in A): 1\nneither: 2\n" in capsys.readouterr().out
    assert celeba_tree() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    first, before = pathlib.Path("files/black/000001.jpg"), celeba_stamps()
    assert first.is_symlink() == (link == "symlink") and first.stat().st_nlink == 1 + (link == "hard")
    prepare_celeba.main(flags)
    assert celeba_stamps() == before and len(os.listdir(CELEBA_DIR)) == [11, 3][link == "move"]
    for n, held_out in (1, [[1, 2, 3], [5, 6, 7], [4], [8]]), (0, [[1, 2, 3, 4], [5, 6, 7, 8], [], []]):
        prepare_celeba.main(flags + ["--test", str(n)])     # the same pictures, placed anew
        assert celeba_tree("black blond black_test blond_test") == held_out
def test_prepare_hostile_zip_doubled_folder_and_choosing(celeba_files, tmp_path, capsys):
    prepare_celeba.main(["--images", "z.zip"])
    assert {p.parent.name for p in tmp_path.rglob("*.jpg")} == {"black", "blond", "img_align_celeba"}
    assert celeba_tree() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    os.renames(CELEBA_DIR, "files/in/img_align_celeba"), os.rename("files/in", CELEBA_DIR)
    os.remove(CELEBA_DIR + "/img_align_celeba/000002.jpg"), os.mkdir("files/x")
    pathlib.Path("files/x/000011.jpg").write_bytes(b"11." * 11)                 # not CelebA's: stays
    prepare_celeba.main("--nameA x --nameB y --test 1 --limit 2".split())
    assert celeba_tree("x x_test y y_test") == [[1, 3, 11], [4], [5, 6], [8]]
    prepare_celeba.main("--A Eyeglasses --B -Eyeglasses --where Male=0 --where Blond_Hair=-1".split())
    assert celeba_tree("eyeglasses no_eyeglasses") == [[3], [1, 9]] and "out: 1\n" in capsys.readouterr().out
@pytest.mark.parametrize("case", (                          # flags: words of the message
    "--attributes none: none: No such; --images none: none: No such; --images .. --out o: --images ..; "
    "--attributes html: web page; --attributes row: 000010.jpg; --attributes rows: 9 rows of 10; "
    "--attributes cut: cut is damaged; --attributes empty: empty is cut short; --images cut: cut is damaged; "
    "--images lfs: is a git-lfs; --images crc --out o: (Bad CRC; --A black_hair: Black_Hair; --test 4: 4; "
    "--B -Glasses: --B -Glasses; --where No=1: --where No: ; --where Male: Male=1; --link soft: --link; "
    "--A Male --B Male: --nameB; --nameA img_align_celeba --link move: --nameA; --out empty: empty; "
    "--out empty --toy 1: empty; --test -1: --test; --where Male=1: give another --out").split("; "))
def test_prepare_bad_input_is_one_line_and_status_2(celeba_files, capsys, case):
    for name, text in dict(html="\n<!DOCTYPE html>", lfs="version https://git-lfs", cut="PK\3\4", empty="",
                           row=CELEBA_CSV[:-9], rows=CELEBA_TXT.rpartition("000010")[0]).items():
        pathlib.Path(name).write_bytes(text.encode())
    pathlib.Path("crc").write_bytes(pathlib.Path("z.zip").read_bytes().replace(b"5.5.", b"5.6."))
    prepare_celeba.main([]), capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        prepare_celeba.main(case.partition(": ")[0].split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("prepare_celeba.py: ") and error.count("\n") == 1
    assert case.partition(": ")[2] in error
def test_prepare_toy_faces(celeba_files):
    def read(name):
        return np.array([np.array(Image.open(p), int) for p in sorted(pathlib.Path("files", name).iterdir())])
    first, again = [prepare_celeba.main("--toy 6 --test 8".split()) or celeba_stamps() for _ in "12"]
    assert first == again
    black, blond, dark, fair = map(read, "toy/black toy/blond toy/black_test toy/blond_test".split())
    assert len(black) == len(blond) == 6 and dark.shape == fair.shape == (8, 64, 64, 3)
    assert len({face.tobytes() for faces in (black, blond, dark) for face in faces}) == 20  # different people
    hair = (dark != fair).any(-1).mean((1, 2))              # its share of each picture, and how much lighter
    assert 0.03 < hair.min() and hair.max() < 0.5 and ((fair - dark).mean((1, 2, 3)) > 50 * hair).all()
    for seed, size in (0, 64), (1, 64), (1, 96):            # another seed or size: drawn anew
        prepare_celeba.toy_faces("files/new", 2, n_test=1, size=size, seed=seed)
        assert np.array_equal(new := read("new/blond"), blond[:2]) == (seed == 0) and new.shape[2] == size
@pytest.mark.skipif(not CELEBA.exists(), reason="CelebA is not at hand")
def test_prepare_real_celeba(tmp_path, capsys):
    prepare_celeba.main(["--images", str(CELEBA / "img_align_celeba_half.zip"), "--out", str(tmp_path),
                         "--attributes", str(CELEBA / "list_attr_celeba.txt.zip")])
    counts = " ".join(line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines())
    assert counts == "202,599 48,472 29,980 3 124,147 74,569 2,432 pictures 1,451 pictures"
    assert [len(os.listdir(tmp_path / name)) for name in ("black", "blond")] == [2432, 1451]
    assert Image.open(min(tmp_path.glob("blond/*"))).size == (89, 109)

# ---- The README ------------------------------------------------------------------------------------------
README, SOURCE = ((ROOT / name).read_text() for name in ("README.md", "cyclegan.py"))
def test_the_readme_tells_the_truth():
    assert not [x for x in re.findall(r'add\("(--\w+)"', SOURCE) if not re.search(rf"{x}\b", README)]
    assert not [x for x in re.findall(r"\]\((?!https?:|#)([^)#]+)", README) if not (ROOT / x).exists()]
    titles = re.sub(r"[^\w -]", "", " ".join(re.findall("^#+ .*", README, re.M))).lower().replace(" ", "-")
    assert not [target for target in re.findall(r"\]\(#([^)]+)", README) if f"-{target}" not in titles]
    sections = re.findall(r"^\| (\d+) \| (\d+) \| ([\w ]+) \|", README, re.M)
    for number, line, title in sections:
        assert SOURCE.splitlines()[int(line) - 1].startswith(f"# ---- {number}. {title} -"), title
    quoted = re.findall(r"^\|[^|`]+\| `([^`]+)` \|", README, re.M)
    assert len(sections) == 11 and len(quoted) > 20 and not [x for x in quoted if f" {x}" not in SOURCE]
@pytest.mark.parametrize("diff", re.findall(r"```diff\n(.*?)```", README, re.S))
def test_forks(data, diff):
    fork, lines = SOURCE, len(re.findall("^[+-]", diff, re.M))
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        old, new = (re.sub("^.", "", re.sub(f"^[{x}].*\n", "", hunk, flags=re.M), flags=re.M) for x in "+-")
        assert fork.count(old) == 1, old
        fork = fork.replace(old, new)
    exec(fork, module := {"__name__": "fork"})
    own = " ".join([*SMALL, *re.findall("^@@ (.*)", diff, re.M), "--dataA a --dataB b --out_dir r"])
    for x in own + " --max_steps 2", "--resume r --max_steps 3", TO + "r/generators.pt --input a --output o":
        assert not module["main"](x.split())
    assert 0 < lines <= 10 and len(os.listdir("o")) == 7
def test_every_command(tmp_path, monkeypatch):      # of docstrings and README; the first as processes
    monkeypatch.chdir(tmp_path), os.mkdir("mnist"), fill("svhn", 3), fill("photos", 3)
    [fill(f"{x}/train{y}", 3) for x in ("horse2zebra", "monet2photo", "cezanne2photo") for y in "AB"]
    [Image.linear_gradient("L").resize((28, 28)).rotate(50 * i).save(f"mnist/{i}.png") for i in range(3)]
    [picture(f"files/img_align_celeba/{i:06}.jpg", (89, 109)) for i in range(1, 11)]
    [pathlib.Path(x, "list_attr_celeba.txt").write_text(CELEBA_TXT) for x in ("files", ".")]
    shutil.make_archive("img_align_celeba", "zip", "files/img_align_celeba")
    torch.save(cyclegan.ResNetGenerator(flags(*SMALL)).state_dict(), "latest_net_G_A.pth")
    text = "\n".join([prepare_celeba.__doc__, cyclegan.__doc__, *re.findall(r"(?ms)^ *```\n.*?```", README)])
    commands, python = re.findall("^ *((?:python|torchrun) .*?)(?:  .*)?$", text, re.M), sys.executable
    for i, command in enumerate(dict.fromkeys(commands)):
        program, *words = command.split()
        if {"--dataA", "--demo", "--bench"} & {*words}:
            words += SMALL + (["--rounds=1"] if "--bench" in words else ["--batch_size=2", "--max_steps=2"])
            "files/black" in words and "--out_dir" not in words and shutil.rmtree("runs/black2blond", True)
        words += ["--max_steps=3"] * ("--resume" in words) + ["--test=1"] * ("--test" in words)
        words += ["--out_dir", "runs/its own"] * ("--demo" in words)
        if program == "torchrun":
            here = f"127.0.0.1:{socket.create_server(('127.0.0.1', 0)).getsockname()[1]}"
            words = " ".join(words).replace("HOST:29500", here).replace("cyclegan.py", f"{ROOT}/cyclegan.py")
            n = 1 + ("nnodes" in words)                                 # machines; two processes in all
            words = words.replace("node=8", f"node={2 // n}").split()
            jobs = [subprocess.Popen([python, "-m", "torch.distributed.run", *words]) for _ in range(n)]
            assert not any([job.wait(100) for job in jobs]), command
        elif i < 8 or "--bench" in words:
            done = subprocess.run([python, ROOT / words[0], *words[1:]], capture_output=True, text=True)
            assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
            said = re.findall("python cyclegan.py |elsewhere|(?<=open ).*(?=:)", done.stdout)
            assert "--demo" not in words or len(said) == 6 and os.path.exists(said[5]), done.stdout
        else:
            assert not (prepare_celeba if "prepare" in words[0] else cyclegan).main(words[1:]), command
    [exec(code.replace("1000", "2"), {}) for code in re.findall(r"```python\n(.*?)```", README, re.S)]
    assert {"black2blond", "its own", "horse2zebra", "women"} < {*os.listdir("runs")} and len(commands) > 20

# ---- The benchmark ---------------------------------------------------------------------------------------
def bench(argv):
    """The textbook step and the real one, with and without its levers, in turns in one process, warmed up."""
    (parser := argparse.ArgumentParser()).add_argument("--rounds", type=int, default=7)     # timed turns each
    own, rest = parser.parse_known_args(argv)
    args, runtime = flags(*rest), cyclegan.Runtime(flags(*rest))
    cuda = torch.cuda if runtime.device.type == "cuda" else None
    torch._dynamo.reset()                                       # a network is compiled 8 times at most
    if cuda and "batch_size" not in args.given:
        return [bench([*argv, f"--batch_size={n}"]) for n in (1, 4, 16)]
    steps, n, wait = (20, 8192, cuda.synchronize) if cuda else (1, 2048, lambda: None)
    levers = {"textbook, eager": None, "cyclegan.py": "--compile on" * bool(cuda), "  --amp off": "--amp off"}
    levers |= {"  --compile off": "--compile off", "  neither": "--compile off --amp off"} if cuda else {}
    pairs = [pictures(args.batch_size, args.size, torch.float32, i) for i in range(4)]
    batches = itertools.cycle([[x.to(runtime.device) for x in pair] for pair in pairs])
    def stepper(extra):                                         # -> a function that takes one step
        model, pools, runtime = trainer(" ".join([*rest, extra or ""]), steps=10**6)
        if extra is not None:
            return lambda: cyclegan.train_step(model, pools, runtime, *next(batches))
        book = Textbook(args).load(model).prepare()
        return lambda: book.step(*next(batches))
    def timed(work, n):                                         # -> seconds a call
        start = wait() or time.perf_counter()
        [work() for _ in range(n)]
        return ((wait() or time.perf_counter()) - start) / n
    works, memory = [], []
    for extra in levers.values():
        before = (gc.collect(), cuda.memory_allocated())[1] if cuda else 0
        works.append(stepper(extra))
        timed(works[-1], 3 + 2 * steps)                         # warming up, and compiling if it does
        cuda and cuda.reset_peak_memory_stats()
        timed(works[-1], 2)
        memory.append(f", {(cuda.max_memory_allocated() - before) / 2**30:.1f} GiB" if cuda else "")
    with FlopCounterMode(display=False) as counter:
        works[0]()
    flop, seconds, ceilings = counter.get_total_flops(), [[] for _ in works], []
    x = torch.randn(n, n, device=runtime.device, dtype=runtime.dtype)
    for _ in range(own.rounds):
        [times.append(timed(work, steps)) for times, work in zip(seconds, works)]
        ceilings.append(2 * n**3 / timed(lambda: x @ x, 10 if cuda else 2))
    ceiling, median = statistics.median(ceilings), statistics.median
    device = cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, torch {torch.__version__}, {' '.join(rest)}: {flop / 1e12:.2f} TFLOP a textbook step; "
          f"{ceiling / 1e12:.2f} TFLOP/s in {runtime.dtype} products; n = {own.rounds} x {steps} steps")
    for name, times, gib in zip(levers, seconds, memory):
        t, ratios = median(times), [book / ours for book, ours in zip(seconds[0], times)]
        print(f"{name:24}{t * 1e3:8.1f} ms/step ({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}), "
              f"{2 * args.batch_size / t:.1f} imgs/s, {flop / t / 1e12:.2f} TFLOP/s {flop / t / ceiling:.0%}"
              f"{gib}, x {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")

if __name__ == "__main__":
    if "--bench" not in sys.argv:
        sys.exit("pytest; or python test_cyclegan.py --bench [--rounds N] [flags of cyclegan.py]")
    bench([flag for flag in sys.argv[1:] if flag != "--bench"])
