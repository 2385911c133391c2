"""Makes the two folders of unpaired pictures that cyclegan.py trains on.

    python prepare_celeba.py             # CelebA in files: black hair to files/black, blond to files/blond
    python prepare_celeba.py --toy 400   # no CelebA at hand: 400 cartoon faces of each in files/toy
    python prepare_celeba.py --images img_align_celeba.zip --attributes list_attr_celeba.txt --test 500
    python prepare_celeba.py --A Eyeglasses --B -Eyeglasses --where Male=1      # men with and without glasses

CelebA (202,599 faces, 40 attributes; for non-commercial research) is a zip of pictures and a .txt list at its
authors', a folder and a .csv list at Kaggle. The same run again changes nothing, or finishes what was
interrupted; with another --test it moves pictures between training and test folders.
"""
import argparse
import contextlib
import difflib
import filecmp
import os
import pathlib
import sys
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin


def die(message):
    """Ends the program: the message in one line on stderr, exit status 2."""
    print("prepare_celeba.py:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def get_args(argv=None):
    """The flags as a namespace; files are looked at later."""
    def whole_number(text):
        return range(10**9).index(int(text))                # a ValueError below 0
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error, add, ways = die, parser.add_argument, ("hard", "symlink", "copy", "move")
    add("--images", default="files/img_align_celeba",      help="folder of pictures, or zip (%(default)s)")
    add("--attributes",                      help=".csv, .txt, or zip (files/list_attr_celeba.csv, or .txt)")
    add("--out",       default="files",      help="folder that gets a folder for each domain (%(default)s)")
    add("--A",         default="Black_Hair", help="attribute of domain A; -NAME is without it (%(default)s)")
    add("--B",         default="Blond_Hair", help="attribute of domain B; -NAME is without it (%(default)s)")
    add("--nameA",                           help="name of A's folder (from the attribute: black)")
    add("--nameB",                           help="name of B's folder (from the attribute: blond)")
    add("--where",     default=[],           help="only rows with NAME=1, without NAME=0", action="append")
    add("--link",      default="hard",       help="how; links copy where they fail (hard)", choices=ways)
    add("--test",      type=whole_number,    help="the last N of each domain go to NAME_test (0; toy: 50)")
    add("--limit",     type=whole_number,    help="only the first N training pictures a domain (0: all)")
    add("--toy",       type=whole_number,    help="instead, draw N cartoon faces a domain in OUT/toy")
    argv = list(sys.argv[1:] if argv is None else argv)
    for i in range(len(argv) - 1, 0, -1):                   # joined: argparse takes -Eyeglasses for a flag
        if argv[i - 1] in ("--A", "--B") and not argv[i].startswith("--"):
            argv[i - 1:i + 1] = [f"{argv[i - 1]}={argv[i]}"]
    args = parser.parse_args(argv)
    for flag, text in (("nameA", args.A), ("nameB", args.B)):
        name = "no_" * text.startswith("-") + text.lstrip("-").lower().removesuffix("_hair")
        setattr(args, flag, getattr(args, flag) or name)
    return args


def check_head(path):
    """Ends the program for what a failed download leaves under a data file's name."""
    with open(path, "rb") as file:
        head = file.read(200).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"<", b"version https://git-lfs")):
        what = "web page" if head.startswith(b"<") else "git-lfs pointer"
        die(f"{path} is a {what}, not the data: download it again (in a browser, or by git lfs pull)")


def read_list(path):
    """The attributes' names, and the rows: a picture's name, then for each "1" (has it), "-1" or "0"."""
    check_head(path)
    data = pathlib.Path(path).read_bytes()
    if data.startswith(b"PK"):                               # Kaggle's has other tables, too
        archive = zipfile.ZipFile(path)
        data = archive.read(min(archive.namelist(), key=lambda name: "attr" not in name))
    lines = data.decode("utf-8-sig", "replace").replace(",", " ").replace('"', "").splitlines()
    rows = [line.split() for line in lines if line.strip()] + [[]]
    n_rows = int(rows.pop(0)[0]) if len(rows[0]) == 1 and rows[0][0].isdecimal() else None
    names, rows = rows[0][rows[0][:1] == ["image_id"]:], rows[1:-1]
    for i, row in enumerate(rows, 1):
        if len(row) != len(names) + 1 or not {"-1", "0", "1"}.issuperset(row[1:]):
            die(f"{path} is damaged or cut short in row {i:,} ({row[0][:40]!r}): download it again")
    if not rows or n_rows not in (None, len(rows)):
        die(f"{path} is cut short: it has {len(rows):,} rows of {n_rows or 202599:,}: download it again")
    return names, rows


def choose(names, rows, args):
    """The names of A's and of B's pictures, two lists in the order of the rows; prints the counts."""
    def test(flag, text):
        name = text.removeprefix("-")
        if name not in names:
            near = difflib.get_close_matches(name.title(), names) or names
            die(f"{flag} {text}: the list does not have it, but {', '.join(near)}")
        at = names.index(name) + 1
        return lambda row: (row[at] == "1") == (name == text)
    for text in args.where:
        name, _, value = text.partition("=")
        if value not in ("1", "0", "-1"):
            die(f"--where {text}: write NAME=1 or NAME=0, such as Male=1")
        rows = [*filter(test("--where", name if value == "1" else "-" + name), rows)]
    is_A, is_B = test("--A", args.A), test("--B", args.B)
    A, B = [row for row in rows if is_A(row)], [row for row in rows if is_B(row) and not is_A(row)]
    print(f"rows: {len(rows):,}\n{args.A}: {len(A):,}\n{args.B}: {len(B):,}\n"
          f"both (kept in A): {sum(map(is_B, A)):,}\nneither: {len(rows) - len(A) - len(B):,}")
    return [row[0] for row in A], [row[0] for row in B]


def place(source, target, link, archive):
    """Puts a picture (a path, or a ZipInfo in archive) at target, unless it is there. It is made under a name
    of its own, so a target is always whole; a moved source goes only after comparison with it."""
    size = source.file_size if archive else os.path.getsize(source)
    if not os.path.exists(target) or os.path.getsize(target) != size:
        part = pathlib.Path(target + ".part")
        part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):                  # another disk, or one without links: copied
            if link != "copy":
                (os.symlink if link == "symlink" else os.link)(os.path.abspath(source), part)
        if not part.exists():
            with open(part, "wb") as file:
                file.write(archive.read(source) if archive else pathlib.Path(source).read_bytes())
                file.flush()
                os.fsync(file.fileno()) if link == "move" else None
        os.replace(part, target)
    if link == "move" and not os.path.islink(target) and filecmp.cmp(source, target, shallow=False):
        os.remove(source)


def sort_pictures(A, B, known, args):
    """Puts the pictures named in A and B into their folders, also those that another --test put elsewhere.
    known: all names of the list; whatever has another name is left alone."""
    def listing(folder):                                    # {name: path}
        return {e.name: os.path.realpath(e.path) if e.is_symlink() else e.path
                for e in (os.scandir(folder) if os.path.isdir(folder) else ())
                if e.name.lower().endswith((".jpg", ".jpeg", ".png")) and e.is_file()}
    archive, link = None, args.link
    if os.path.isdir(args.images):                          # Kaggle's has a second one inside
        pictures = max((listing(args.images + "/img_align_celeba" * depth) for depth in range(3)), key=len)
    else:
        check_head(args.images)
        archive, link = zipfile.ZipFile(args.images), "copy"
        pictures = {os.path.basename(member.filename): member for member in archive.infolist()}
    folders = [os.path.join(args.out, a + b) for a in (args.nameA, args.nameB) for b in ("", "_test")]
    homes = set() if archive else {os.path.dirname(path) for path in pictures.values()}
    if len({*map(os.path.realpath, folders)} - {*map(os.path.realpath, homes)}) < 4:
        die(f"--nameA {args.nameA}, --nameB {args.nameB}: give two names, neither of them of --images")
    now = {name: folder for folder in folders for name in listing(folder)}
    plan, n_test = {}, args.test or 0
    for names, text, train, test in ((A, args.A, *folders[:2]), (B, args.B, *folders[2:])):
        names = [name for name in names if name in pictures or name in now]
        if (n := len(names) - n_test) < 1:
            die(f"--images {args.images}: {n + n_test} pictures with {text} are too few (--test {n_test})")
        plan |= dict.fromkeys(names[:n][:args.limit or None], train) | dict.fromkeys(names[n:], test)
    for name in known.intersection(now).difference(plan):
        die(f"{now[name]} holds {name}, which does not go there with these flags: give another --out")
    print(f"not in {args.images}, left out: {len({*A, *B} - pictures.keys() - now.keys()):,}")
    for folder in dict.fromkeys(plan.values()):
        os.makedirs(folder, exist_ok=True)
        print(f"{folder}: {list(plan.values()).count(folder):,} pictures")
    for name, folder in plan.items():
        if now.get(name, folder) != folder:
            os.replace(os.path.join(now[name], name), os.path.join(folder, name))
        if name in pictures:
            place(pictures[name], os.path.join(folder, name), link, archive)


# ----------------------------------------------------------------------------------------------- toy faces
SKINS, EYES = "ffdec0 f2ccaa e2b490 c8946e a47252 7c543c".split(), "4e3424 3c281e 4c708c 587450".split()
SHIRTS = "ac3e3e 3c6094 468060 dededa 3a3a46 ce964a 825a8c".split()
WALLS = "b0c4ce 96ac96 c4aaa0 808296 ceccc8 b2a0b8 6e8ca0 4a4e5c 3c4a42 cebe90 a07c6a d8c6be".split()
# Fringes (none, straight, swept, parted): where they part, -1 to 1; height there; fall to the sides; bend.
FRINGES = (0, 0.20, 0.13, 4), (0, 0.09, 0.03, 6), (-0.5, 0.20, 0.13, 1.6), (0, 0.21, 0.16, 0.7)


def draw_face(rng, blond, size=64):
    """One cartoon face, a size x size RGB picture (PIL). rng, a numpy Generator, decides all but the hair's
    colour: the same state of rng with blond False and True is one person with black and with blond hair."""
    skin, eye, shirt, wall, end = (np.array([*bytes.fromhex(rng.choice(colours))]) + rng.uniform(-10, 10)
                                   for colours in (SKINS, EYES, SHIRTS, WALLS, WALLS))
    length, (mid, top, fall, bend), side = rng.integers(3), FRINGES[rng.integers(4)], rng.choice((-1, 1))
    cx, cy, zoom, wide, chin, volume, ends, brow, smile, lip, shade, glasses, plain = rng.uniform(
        (0.46, 0.49, 1.06, 0.205, 0.26, 0.035, -0.03, 0.00, -0.01, 0.018, -1, -3, -1),
        (0.54, 0.54, 1.20, 0.235, 0.29, 0.060, +0.06, 0.02, +0.06, 0.032, +1, +1, +1))
    # Only from here on does blond matter: everything drawn from rng is drawn above.
    hair = np.array((222, 186, 108)) + 18 * shade if blond else np.array((37, 30, 28)) + 8 * shade
    scale = 4 * size                                        # drawn four times too large, then averaged
    rows = np.linspace(wall, wall if plain > 0 else end, scale).clip(0, 255).astype(np.uint8)
    draw = ImageDraw.Draw(image := Image.fromarray(rows[:, None].repeat(scale, 1)))

    def paint(points, colour, width=None):                  # a line if it has a width; the eyes are at y = 0
        points = [(scale * (cx + zoom * x), scale * (cy + zoom * y)) for x, y in points]
        rgb = tuple(np.clip(colour, 0, 255).astype(int).tolist())
        draw.line(points, rgb, round(scale * zoom * width), "curve") if width else draw.polygon(points, rgb)

    def oval(x, y, rx, ry, start=0, end=360):               # in degrees, 90 is below
        angle = np.radians(np.linspace(start, end, 48))
        return [*zip(x + rx * np.cos(angle), y + ry * np.sin(angle))]
    crown, tips = wide + volume, (0, 0.26, 0.44)[length] + ends             # short, to the chin, long
    scalp = oval(0, -0.05, crown, 0.28, 180, 360)
    paint(scalp + [(crown, tips - 0.02), (-crown, tips - 0.02)], hair * (0.8 if blond else 0.7))
    for x, y, rx, ry, colour in (                       # shoulders, collar, neck, ears, face, cheeks, eyes
            (0, 0.6, 0.44, 0.25, shirt), (0, 0.39, 0.13, 0.06, shirt * 0.8), (0, 0.27, 0.1, 0.15, skin * 0.8),
            (wide, 0.03, 0.035, 0.055, skin * 0.93), (0, 0, wide, chin, skin),
            (0.124, 0.1, 0.042, 0.028, skin * (1, 0.9, 0.9)), (0.1, 0, 0.044, 0.028, 3 * [250]),
            (0.1, 0, 0.026, 0.027, eye), (0.1, 0, 0.01, 0.01, 3 * [9]), (0.11, -0.01, 0.01, 0.01, 3 * [255])):
        paint(oval(-x, y, rx, ry), colour)
        paint(oval(+x, y, rx, ry), colour)
    paint([(0, 0.02), (side * 0.022, 0.085), (0, 0.092)], skin * 0.78, 0.013)
    paint([(x, 0.16 + smile - 178 * smile * x * x) for x in np.arange(-7, 8) / 93], skin * (1, 0.5, 0.5), lip)
    for s in (-1, 1):
        paint(oval(s * 0.1, -0.003, 0.046, 0.029, 190, 350), skin * 0.3, 0.011)
        paint(oval(s * 0.1, -0.035 - brow, 0.055, 0.03, 205, 335), (52, 40, 36), 0.016)   # always dark
        if glasses > 0:
            paint(oval(s * 0.1, 0.004, 0.068, 0.056), (40, 36, 44), 0.014)
            paint([(s * 0.162, -0.01), (s * wide, -0.02)], (40, 36, 44), 0.012)
            paint([(0, -0.005), (s * 0.03, -0.005)], (40, 36, 44), 0.012)
    lock = [(crown + 0.01, tips - 0.05), (crown, tips), (wide * 1.02, tips - 0.015), (wide * 0.92, 0)]
    hairline = [(0.93 * wide * side * x, fall * abs((x - mid) / (1 - mid * np.sign(x - mid))) ** bend - top)
                for x in side * np.linspace(1, -1, 40)]
    paint(scalp + lock + hairline + [(-x, y) for x, y in reversed(lock)], hair)
    paint(oval(0, -0.05, crown - 0.05, 0.225, 270 + side * 15, 270 + side * 65), hair + 25, 0.022)
    return image.reduce(4)


def toy_faces(out, n, n_test=50, size=64, seed=0):
    """Draws size x size PNGs: n faces a domain, all different people, in out/black and out/blond, and n_test
    pairs, alike but for the hair, of equal names in out/black_test and out/blond_test. Each is a function of
    (seed, domain, index) alone; those that are there are left."""
    for domain, folder in enumerate(("black", "blond", "black_test", "blond_test")):
        os.makedirs(os.path.join(out, folder), exist_ok=True)
        for index in range((n, n_test)[domain // 2]):
            path, note = os.path.join(out, folder, f"{index:05}.png"), PngImagePlugin.PngInfo()
            mark = f"toy face: seed {seed}, domain {domain}, index {index}, size {size}"
            if not os.path.exists(path) or mark.encode() not in pathlib.Path(path).read_bytes():
                note.add_text("Comment", mark)
                face = draw_face(np.random.default_rng((seed, min(domain, 2), index)), domain % 2 == 1, size)
                face.save(part := f"{path}.part{os.getpid()}", "PNG", pnginfo=note)
                os.replace(part, path)


def main(argv=None):
    """What the command line does. Bad input ends it with one line and exit status 2."""
    args = get_args(argv)
    path = args.attributes or max((f"files/list_attr_celeba.{e}" for e in ("csv", "txt")), key=os.path.exists)
    try:
        if args.toy is not None:
            toy_faces(os.path.join(args.out, "toy"), args.toy, 50 if args.test is None else args.test)
            return print(f"{args.out}/toy: {args.toy:,} faces in black, as many in blond, and the test pairs")
        names, rows = read_list(path)
        path = args.images
        sort_pictures(*choose(names, rows, args), {row[0] for row in rows}, args)
    except OSError as error:
        die(f"{error.filename or args.out}: {error.strerror or error}: correct --images, --attributes, --out")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        die(f"{path} is damaged, or not all of a zip ({error}): download it again")


if __name__ == "__main__":
    main()
