"""Make the two folders of unpaired images that cyclegan.py trains on.

    python prepare_celeba.py             # CelebA by hair color: files/black and files/blond
    python prepare_celeba.py --test 500  # the last 500 of each in files/black_test, blond_test
    python prepare_celeba.py --A Eyeglasses --B -Eyeglasses --where Male=1  # men, two folders
    python prepare_celeba.py --toy 400   # no CelebA at hand: draw 400 faces of each in files/toy

CelebA (202,599 faces, 40 attributes) is for non-commercial research. The same command again changes
nothing, or finishes what was interrupted; a new --test moves images between training and test.
"""
import argparse
import os
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, PngImagePlugin

def die(message):
    """Print the message as one line on stderr and exit with status 2."""
    print("prepare_celeba.py:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)

def count(text):
    """A type for argparse: whole numbers from 0."""
    if int(text) < 0:
        raise ValueError
    return int(text)

def get_args(argv=None):
    """Parse the flags -> namespace. Files are looked at later."""
    parser = argparse.ArgumentParser(
        usage="python prepare_celeba.py [flags]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    add = parser.add_argument_group("CelebA").add_argument
    add("--images", nargs=1, default=["files/img_align_celeba", "files/img_align_celeba.zip"],
        help="folder of images, or a zip (default: the first that exists of %(default)s)")
    add("--attributes", nargs=1, help="table, or a zip of it (default: the first of %(default)s)",
        default=["files/list_attr_celeba.csv", "files/list_attr_celeba.txt",
                 "files/list_attr_celeba.csv.zip", "files/list_attr_celeba.txt.zip"])

    add = parser.add_argument_group("choosing images").add_argument
    add("--A", default="Black_Hair", help="attribute of A; -NAME negates it (default: %(default)s)")
    add("--B", default="Blond_Hair", help="attribute of B; -NAME negates it (default: %(default)s)")
    add("--where", default=[], action="append",
        help="use only images with (NAME=1) or without (NAME=0) an attribute; can be repeated")
    add("--test", type=count,
        help="put this many images of each domain into test folders (default: 0; toy faces: 50)")
    add("--limit", type=count, help="training images to keep of each domain (default: 0, all)")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=os.path.expanduser, default="files", help="parent folder (default: files)")
    add("--nameA", help="name of A's folder (default: from the attribute, such as black)")
    add("--nameB", help="name of B's folder (default: from the attribute, such as blond)")
    add("--link", default="copy", choices=["copy", "hard", "symlink", "move"],
        help="how to place images (default: copy; always for a zip). Links take no space, but "
             "editing a linked image changes the original; where linking fails, images are copied")

    add = parser.add_argument_group("toy faces").add_argument
    add("--toy", type=count, help="instead of sorting CelebA, draw this many faces of each domain "
        "into OUT/toy; --test N adds N test people, in both hair colors")

    # argparse takes the "-Eyeglasses" of "--B -Eyeglasses" for a flag, so join the two by "=".
    argv = list(sys.argv[1:] if argv is None else argv)
    for flag in {"--A", "--B"}.intersection(argv):
        i = argv.index(flag)
        argv[i:i + 2] = ["=".join(argv[i:i + 2])]
    return parser.parse_args(argv)

def progress(items):
    """Yield the items and print how many are done: live on a terminal, else every 10 seconds."""
    interval, end = (0.1, "\r") if sys.stdout.isatty() else (10, "\n")
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > interval:
            print(f"{done:,} of {len(items):,}", end=end, flush=True)
            last = time.monotonic()

# ---- CelebA --------------------------------------------------------------------------------------
def find(paths):
    """The first of the paths that exists. Exits for what a failed download leaves behind."""
    for path in paths:
        path = Path(path).expanduser()
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(200).lstrip()
            if start.startswith((b"<", b"version https://git-lfs")):
                die(f"{path} is a git-lfs pointer or a web page, not the data: download it again")
        if path.exists():
            return path
    die(f"{' or '.join(paths)}: No such file. Download img_align_celeba and list_attr_celeba from "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html or Kaggle (jessicali9530/celeba-dataset)"
        " into files, or draw toy faces instead: --toy 400")

def read_attributes(path):
    """-> names of the attributes, and rows: an image's name, then "1" for each attribute it has."""
    data = path.read_bytes()
    if data.startswith(b"PK"):
        archive = zipfile.ZipFile(path)
        for member in archive.namelist():
            if "attr" in member:
                data = archive.read(member)
                break

    # The .csv has commas, the .txt has spaces and begins with the number of rows.
    text = data.decode("utf-8-sig", "replace").replace(",", " ").strip()
    rows = [line.split() for line in text.splitlines()]
    n_rows = 1
    if rows and rows[0][0].isdecimal():
        n_rows = int(rows.pop(0)[0])
    if len(rows) < 1 + n_rows:
        die(f"{path} is cut short: {len(rows) - 1:,} rows of {n_rows:,}: download it again")
    names = rows.pop(0)
    if names[0] == "image_id":
        names.pop(0)
    for i, row in enumerate(rows, 1):
        if len(row) != 1 + len(names) or not {"-1", "0", "1"}.issuperset(row[1:]):
            die(f"{path} is damaged or cut short in row {i:,}, {row[:1]}: download it again")
    return names, rows

def having(names, rows, flag, attribute):
    """The rows of images that have the attribute NAME or, for -NAME, do not have it."""
    name = attribute.removeprefix("-")
    if name not in names:
        die(f"{flag} {attribute}: there is no such attribute, only {', '.join(names)}")
    column = 1 + names.index(name)
    wanted = name == attribute
    return [row for row in rows if (row[column] == "1") == wanted]

def choose(names, rows, args):
    """-> names of A's and of B's images, in the order of the list. Prints how many there are."""
    for condition in args.where:
        name, _, value = condition.partition("=")
        signs = {"1": "", "0": "-"}
        if value not in signs:
            die(f"--where {condition}: write NAME=1 or NAME=0, such as Male=1")
        rows = having(names, rows, "--where", signs[value] + name)

    A = [row[0] for row in having(names, rows, "--A", args.A)]
    B = [row[0] for row in having(names, rows, "--B", args.B)]
    both = set(A).intersection(B)
    B = [name for name in B if name not in both]
    print(f"rows: {len(rows):,}\n{args.A}: {len(A):,}\n{args.B}: {len(B):,}")
    print(f"both (kept in A): {len(both):,}\nneither: {len(rows) - len(A) - len(B):,}")
    return A, B

def find_images(path):
    """-> {name: image} of a folder or a zip, and the function that reads one of these images."""
    if path.is_dir():
        return {image.name: image for image in path.iterdir()}, Path.read_bytes
    archive = zipfile.ZipFile(path)
    return {os.path.basename(info.filename): info for info in archive.infolist()}, archive.read

def place(image, target, link, read):
    """Put an image at target, unless it is there. It gets this name when the file is complete."""
    data = read(image)
    if not target.exists() or target.read_bytes() != data:
        part = Path(f"{target}.part")
        part.unlink(missing_ok=True)
        try:
            if link == "hard":
                os.link(image.resolve(), part)
            elif link == "symlink":
                os.symlink(image.resolve(), part)
            else:
                part.write_bytes(data)
        except OSError:                                 # another disk, or one without links
            part.write_bytes(data)
        part.replace(target)
    if link == "move" and not target.is_symlink():
        image.unlink()

def folder_name(attribute):
    """Black_Hair -> black, -Eyeglasses -> no_eyeglasses."""
    return attribute.replace("-", "no_").lower().removesuffix("_hair")

def sort_images(source, A, B, known, args):
    """Put the images named in A and B into their folders, wherever an earlier run has put them.
    Files in these folders whose names are not known, from the list, are left alone."""
    while (source / "img_align_celeba").is_dir():       # Kaggle's is a folder in a folder
        source /= "img_align_celeba"
    images, read = find_images(source)
    link = args.link if source.is_dir() else "copy"
    train_A = Path(args.out, args.nameA or folder_name(args.A))
    train_B = Path(args.out, args.nameB or folder_name(args.B))
    folders = [train_A, Path(f"{train_A}_test"), train_B, Path(f"{train_B}_test")]
    if len({folder.resolve() for folder in [source, *folders]}) < 5:
        die("--nameA and --nameB must differ from each other and from the folder of --images")

    current = {}                                        # {name: path}, as earlier runs left it
    for folder in filter(Path.is_dir, folders):
        current |= {path.name: path for path in folder.iterdir()}
    available = {**images, **current}
    plan = {}                                           # {name: path}, as it will be
    n_test = args.test or 0
    for names, attribute, train in [(A, args.A, train_A), (B, args.B, train_B)]:
        names = [name for name in names if name in available]
        n_train = len(names) - n_test
        if n_train < 1:
            die(f"--images {source}: {len(names)} with {attribute} are too few (--test {n_test})")
        plan |= {name: train / name for name in names[:n_train][:args.limit or None]}
        plan |= {name: Path(f"{train}_test", name) for name in names[n_train:]}
    for name in known.intersection(current).difference(plan):
        die(f"{current[name]} does not belong there with these flags: use another --out")

    print(f"not in {source}, left out: {len({*A, *B}.difference(available)):,}")
    for name, target in progress(plan.items()):
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in current:
            current[name].replace(target)
        if name in images:
            place(images[name], target, link, read)
    for folder in filter(Path.is_dir, folders):
        print(f"{folder}: {len(os.listdir(folder)):,} images")

# ---- Toy faces -----------------------------------------------------------------------------------
SKINS = "#ffdec0 #f2ccaa #e2b490 #c8946e #a47252 #7c543c"
EYES = "#4e3424 #3c281e #4c708c #587450"
SHIRTS = "#ac3e3e #3c6094 #468060 #dededa #3a3a46 #ce964a #825a8c"
WALLS = ("#b0c4ce #96ac96 #c4aaa0 #808296 #ceccc8 #b2a0b8 "
         "#6e8ca0 #4a4e5c #3c4a42 #cebe90 #a07c6a #d8c6be")
HAIR_LENGTHS = [0, 0.26, 0.44]                  # short, to the chin, long
FRINGES = [                                     # parted at x, height there, fall to the sides, bend
    (0, 0.20, 0.13, 4),                         # none
    (0, 0.09, 0.03, 6),                         # straight
    (-0.5, 0.20, 0.13, 1.6),                    # swept to a side
    (0, 0.21, 0.16, 0.7)]                       # parted in the middle
# The other traits are uniform between two values:
#            x     y    zoom  width  chin  volume  ends  brows  smile   lips  shade glasses plain
LOWEST =  [0.46, 0.49, 1.06, 0.205, 0.26, 0.035, -0.03, 0.00, -0.01, 0.018,    -1,    -3,   -1]
HIGHEST = [0.54, 0.54, 1.20, 0.235, 0.29, 0.060,  0.06, 0.02,  0.06, 0.032,     1,     1,    1]

def rgb(code):
    """A color such as "#ffdec0" -> array of red, green and blue, 0 to 255."""
    return np.array(ImageColor.getrgb(code))

def arc(x, y, rx, ry, start=0, end=360):
    """Points of an ellipse around (x, y). start and end: degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, end, 48))
    return np.column_stack([x + rx * np.cos(angle), y + ry * np.sin(angle)])

def draw_face(rng, blond, size=64):
    """One drawn face, a size x size RGB image (PIL). rng, a numpy Generator, decides everything but
    the color of the hair: the same state of rng gives the same person with black and blond hair."""
    skin, eyes, shirt, wall, wall_bottom = [
        rgb(rng.choice(palette.split())) + rng.uniform(-10, 10)
        for palette in (SKINS, EYES, SHIRTS, WALLS, WALLS)]
    length = rng.choice(HAIR_LENGTHS)
    fringe = rng.choice(FRINGES)
    side = rng.choice([-1, 1])
    x, y, zoom, width, chin, volume, ends, brows, smile, lips, shade, glasses, plain = (
        rng.uniform(LOWEST, HIGHEST))

    scale = 4 * size                            # drawn four times too large, averaged at the end
    column = np.linspace(wall, wall if plain > 0 else wall_bottom, scale).clip(0, 255)
    image = Image.fromarray(column.astype(np.uint8)[:, None].repeat(scale, axis=1))
    draw = ImageDraw.Draw(image)

    def paint(points, color, line_width=None):
        """Fill a polygon, or draw a line. (0, 0) is between the eyes, y points down."""
        pixels = (scale * (zoom * np.array(points) + [x, y])).ravel().tolist()
        color = tuple(map(int, np.clip(color, 0, 255)))
        if line_width:
            draw.line(pixels, color, round(scale * zoom * line_width), "curve")
        else:
            draw.polygon(pixels, color)

    code, variation, shadow = ("#deba6c", 18, 0.8) if blond else ("#251e1c", 8, 0.7)
    hair = rgb(code) + variation * shade
    crown = width + volume
    tips = length + ends
    scalp = arc(0, -0.05, crown, 0.28, 180, 360)
    paint([*scalp, (crown, tips - 0.02), (-crown, tips - 0.02)], hair * shadow)
    draw_head(paint, skin, eyes, shirt, width, chin)
    draw_features(paint, skin, width, side, smile, lips, brows, glasses > 0)
    draw_front_hair(paint, hair, scalp, crown, tips, width, side, fringe)
    return image.reduce(4)

def draw_head(paint, skin, eyes, shirt, width, chin):
    """Ellipses from the shoulders to the eyes, each painted over those above it, on both sides."""
    ellipses = [                                                # x, y, radii along x and y, color
        (0, 0.6, 0.44, 0.25, shirt),
        (0, 0.39, 0.13, 0.06, shirt * 0.8),                     # collar
        (0, 0.27, 0.1, 0.15, skin * 0.8),                       # neck
        (width, 0.03, 0.035, 0.055, skin * 0.93),               # ears
        (0, 0, width, chin, skin),
        (0.124, 0.1, 0.042, 0.028, skin * (1, 0.9, 0.9)),       # cheeks
        (0.1, 0, 0.044, 0.028, rgb("#fafafa")),
        (0.1, 0, 0.026, 0.027, eyes),
        (0.1, 0, 0.01, 0.01, rgb("#090909")),                   # pupils
        (0.11, -0.01, 0.01, 0.01, rgb("#ffffff"))]              # light reflected by the eyes
    for x, y, rx, ry, color in ellipses:
        paint(arc(-x, y, rx, ry), color)
        paint(arc(x, y, rx, ry), color)

def draw_features(paint, skin, width, side, smile, lips, brows, glasses):
    """Lines: nose, mouth, eyelids, eyebrows and glasses."""
    paint([(0, 0.02), (side * 0.022, 0.085), (0, 0.092)], skin * 0.78, 0.013)
    mouth = [(x, 0.16 + smile * (1 - 178 * x * x)) for x in np.arange(-7, 8) / 93]
    paint(mouth, skin * (1, 0.5, 0.5), lips)
    frame = rgb("#28242c")
    for side in (-1, 1):
        x = side * 0.1
        paint(arc(x, -0.003, 0.046, 0.029, 190, 350), skin * 0.3, 0.011)
        paint(arc(x, -0.035 - brows, 0.055, 0.03, 205, 335), rgb("#342824"), 0.016)
        if glasses:
            paint(arc(x, 0.004, 0.068, 0.056), frame, 0.014)
            paint([(side * 0.162, -0.01), (side * width, -0.02)], frame, 0.012)
            paint([(0, -0.005), (side * 0.03, -0.005)], frame, 0.012)

def draw_front_hair(paint, color, scalp, crown, tips, width, side, fringe):
    """Around the face: over the scalp, down the right side, along the fringe, up the left side."""
    right = [(crown + 0.01, tips - 0.05), (crown, tips),
             (width * 1.02, tips - 0.015), (width * 0.92, 0)]
    left = np.flipud(right) * (-1, 1)
    part, top, fall, bend = fringe
    x = np.linspace(1, -1, 40)
    distance = side * x - part
    distance /= 1 - part * np.sign(distance)                    # 0 at the part, 1 at the sides
    forehead = np.column_stack([0.93 * width * x, fall * abs(distance) ** bend - top])
    paint(np.concatenate([scalp, right, forehead, left]), color)
    shine = arc(0, -0.05, crown - 0.05, 0.225, 270 + side * 15, 270 + side * 65)
    paint(shine, color + 25, 0.022)

def toy_faces(out, n, n_test=50, size=64, seed=0):
    """Draw n faces of each domain, all different people, in out/black and out/blond, and n_test
    people with both colors of hair in out/black_test and out/blond_test. A face depends on seed,
    domain and index only. Faces of another seed or size are drawn anew, other files stay."""
    folders = [Path(out, name) for name in ("black", "blond", "black_test", "blond_test")]
    missing = []
    for domain, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(n if domain < 2 else n_test):
            path = folder / f"{index:05}.png"
            comment = f"toy face: size {size}, seed {seed}, domain {domain}, index {index}"
            if path.exists():
                data = path.read_bytes()
                if b"toy face:" not in data:
                    die(f"{path} was not drawn by this program: use another --out")
                if comment.encode() in data:
                    continue
            missing.append((path, domain, index, comment))
    for path, domain, index, comment in progress(missing):
        rng = np.random.default_rng((seed, min(domain, 2), index))  # a test pair is one person
        face = draw_face(rng, domain % 2 == 1, size)
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", comment)
        part = Path(f"{path}.part")
        face.save(part, "PNG", pnginfo=info)
        part.replace(path)
    for folder in folders:
        print(f"{folder}: {len(os.listdir(folder)):,} images")

def main(argv=None):
    """Run the command line. Bad input ends it with one line on stderr and exit status 2."""
    args = get_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # for names that the console cannot print
    try:
        if args.toy is not None:
            n_test = 50 if args.test is None else args.test
            return toy_faces(Path(args.out, "toy"), args.toy, n_test)
        source = find(args.images)
        path = find(args.attributes)
        names, rows = read_attributes(path)
        A, B = choose(names, rows, args)
        path = source                                   # the name for the error below
        sort_images(source, A, B, {row[0] for row in rows}, args)
    except OSError as error:
        die(f"{error.filename or args.out}: {error.strerror or error}")
    except (zipfile.BadZipFile, zlib.error) as error:
        die(f"{path} is damaged ({error}): download it again")

if __name__ == "__main__":
    main()
