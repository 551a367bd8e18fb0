"""The generator of instances as loops over Python floats: slow, short, independent.

One image. Tensors are nested lists; boxes are ``[x1, y1, x2, y2]`` in pixels, half open. The
backbone and the CRF are callables on nested lists. Constants are written out, so that a changed
default fails.
"""

import math

import reference_labels


def plane(size, value):  # -> [h][w]
    return [[value(i, j) for j in range(size[1])] for i in range(size[0])]


def at(values, y, x):  # bilinear, in shares of the height and the width, clamped to the border
    h, w = len(values), len(values[0])
    i, j = min(max(y * h - 0.5, 0), h - 1), min(max(x * w - 0.5, 0), w - 1)
    i0, j0 = int(i), int(j)
    i1, j1 = min(i0 + 1, h - 1), min(j0 + 1, w - 1)
    a, b = i - i0, j - j0
    upper = (1 - b) * values[i0][j0] + b * values[i0][j1]
    lower = (1 - b) * values[i1][j0] + b * values[i1][j1]
    return (1 - a) * upper + a * lower


# ------------------------------------------------------------------------------------------- step 1


def clipped(low, high, pixels):
    low, high = max(low, 0), min(high, pixels)
    if high - low < 1:
        middle = min(max((low + high) / 2, 0.5), pixels - 0.5)
        low, high = middle - 0.5, middle + 0.5
    return low, high


def window(box, image_size):  # -> [x1, y1, x2, y2] of a clipped box, whole pixels
    x1, y1, x2, y2 = box
    found = []
    for low, high, pixels in ((x1, x2, image_size[1]), (y1, y2, image_size[0])):
        margin = max(0.5 * math.sqrt((x2 - x1) * (y2 - y1)), 0.5 * (64 - (high - low)))
        found.append((max(math.floor(low - margin), 0), min(math.ceil(high + margin), pixels)))
    return [found[0][0], found[1][0], found[0][1], found[1][1]]


def crop_size(h, w, side):
    factor = side / math.sqrt(h * w)
    return tuple(32 * max(1, round(n * factor / 32)) for n in (h, w))


def shrunk(line, cells):  # one row of pixels, antialiased bilinear
    scale = len(line) / cells
    reach = max(scale, 1.0)
    found = []
    for i in range(cells):
        middle, total, weights = (i + 0.5) * scale, 0.0, 0.0
        for j, value in enumerate(line):
            weight = max(0.0, 1 - abs(j + 0.5 - middle) / reach)
            total, weights = total + weight * value, weights + weight
        found.append(total / weights)
    return found


def resized(channel, size):  # [H][W] whole numbers -> [h][w] whole numbers
    if (len(channel), len(channel[0])) == tuple(size):
        return channel
    rows = [shrunk(row, size[1]) for row in channel]
    columns = [shrunk(list(column), size[0]) for column in zip(*rows, strict=True)]
    return [[float(round(x)) for x in row] for row in zip(*columns, strict=True)]


def cut(image, view, size):
    x1, y1, x2, y2 = view
    return [resized([row[x1:x2] for row in channel[y1:y2]], size) for channel in image]


# -------------------------------------------------------------------------------------- steps 2, 3


def overlap(low, high, first, last):
    return max(0.0, min(high, last) - max(low, first))


def cover(boxes, view, size):  # share of each cell of a window that the most covering box covers
    x1, y1, x2, y2 = view
    tall, wide = (y2 - y1) / size[0], (x2 - x1) / size[1]

    def value(i, j):
        top, left = y1 + i * tall, x1 + j * wide
        shares = [
            overlap(b[0], b[2], left, left + wide) * overlap(b[1], b[3], top, top + tall)
            for b in boxes
        ]
        return max(shares) / (tall * wide)

    return plane(size, value)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    norms = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / norms if norms > 0 else 0.0


def attention(f, covered):  # f: [D][h][w]
    size = len(covered), len(covered[0])
    cells = [(i, j) for i in range(size[0]) for j in range(size[1])]
    vector = {(i, j): [channel[i][j] for channel in f] for i, j in cells}
    least = sorted(cells, key=lambda p: covered[p[0]][p[1]])[:4]
    background = [p for p in cells if covered[p[0]][p[1]] < 0.01 or p in least]

    def value(i, j):
        around = [(i + y, j + x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        if all(covered[y][x] == 0 for y, x in around if 0 <= y < size[0] and 0 <= x < size[1]):
            return 1.0
        nearest = sorted((cosine(vector[i, j], vector[p]) for p in background), reverse=True)[:3]
        return sum(nearest) / len(nearest)

    return plane(size, value)


# ------------------------------------------------------------------------------------------- step 4


class Zoomed:
    """One box: its window, its pixels in the crop of the CRF, z and the log-odds."""

    def __init__(self, image, box, backbone, whole, side):  # whole: M [H][W]
        image_size = len(image[0]), len(image[0][0])
        x1, x2 = clipped(box[0], box[2], image_size[1])
        y1, y2 = clipped(box[1], box[3], image_size[0])
        self.box = [x1, y1, x2, y2]
        self.view = window(self.box, image_size)
        left, top, right, bottom = self.view
        large = crop_size(bottom - top, right - left, side)
        self.size = large[0] // 2, large[1] // 2
        self.features = backbone(cut(image, self.view, large))
        cells = len(self.features[0]), len(self.features[0][0])
        own = attention(self.features, cover([self.box], self.view, cells))
        self.tau = min(1.0, 2 * math.sqrt((x2 - x1) * (y2 - y1) / (image_size[0] * image_size[1])))

        def place(i, j):
            y = top + (i + 0.5) * (bottom - top) / self.size[0]
            return y, left + (j + 0.5) * (right - left) / self.size[1]

        def near(i, j):
            return -at(own, (i + 0.5) / self.size[0], (j + 0.5) / self.size[1])

        def far(i, j):
            y, x = place(i, j)
            return at(whole, y / image_size[0], x / image_size[1])

        def radius(i, j):
            y, x = place(i, j)
            u, v = (2 * x - x1 - x2) / (x2 - x1), (2 * y - y1 - y2) / (y2 - y1)
            return u * u + v * v

        row = int((((y1 + y2) / 2 - top) / (bottom - top)) * self.size[0])
        column = int((((x1 + x2) / 2 - left) / (right - left)) * self.size[1])

        def inside(i, j):
            y, x = place(i, j)
            return (x1 <= x < x2 and y1 <= y < y2) or (i, j) == (row, column)

        self.inside, self.radius = plane(self.size, inside), plane(self.size, radius)
        half = self.tau / 2
        z = self.standard(lambda i, j: (1 - half) * near(i, j) + half * far(i, j) / 6)
        first, second = self.standard(near), self.standard(far)
        products = [first[p] * second[p] for p in self.pixels()]
        trust = self.tau * min(1.0, 1.2 * max(0.0, sum(products) / len(products)))
        self.trust = trust
        ordered = sorted(far(i, j) for i, j in self.pixels())
        low = min(0.0, ordered[int(0.4 * (len(ordered) - 1))])

        def odds(i, j):
            if not self.inside[i][j]:
                return -6.0
            prior = 3 * (1 - self.radius[i][j]) + 1
            return (1 - trust) * prior + z[i, j] + trust * (far(i, j) - low)

        self.odds = plane(self.size, odds)

    def standard(self, value):  # -> {(i, j): value}, mean 0 and deviation 1 inside
        found = {p: value(*p) for p in self.pixels()}
        mean = sum(found.values()) / len(found)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in found.values()) / len(found))
        return {p: (x - mean) / deviation if deviation > 1e-6 else 0.0 for p, x in found.items()}

    def pixels(self):
        h, w = self.size
        return [(i, j) for i in range(h) for j in range(w) if self.inside[i][j]]

    def ellipse(self):
        least = min(self.radius[i][j] for i, j in self.pixels())
        return {(i, j) for i, j in self.pixels() if self.radius[i][j] < 1 + 1 / 3} | {
            (i, j) for i, j in self.pixels() if self.radius[i][j] == least
        }


# ------------------------------------------------------------------------------------- steps 6 to 9


def gaps(zoomed, q, stretch):  # left, top, right, bottom; shares of the box
    on = [(i, j) for i, j in zoomed.pixels() if q[i][j] > 0.5]
    if not on:
        return [0.0, 0.0, 0.0, 0.0]
    found = []
    for axis, sign in ((1, 1), (0, 1), (1, -1), (0, -1)):
        every = sorted({p[axis] for p in zoomed.pixels()}, reverse=sign < 0)
        first = (min if sign > 0 else max)(p[axis] for p in on)
        gap = every.index(first) / len(every)
        found.append(gap if gap <= stretch * (1 - zoomed.trust) else 0.0)
    return found


def difference(zoomed, q):  # cosine to the mask's mean feature minus that to the rest's
    f, (h, w) = zoomed.features, zoomed.size
    cells = len(f[0]), len(f[0][0])
    on = {(i, j) for i, j in zoomed.pixels() if q[i][j] > 0.5} or zoomed.ellipse()
    rows, columns = h // cells[0], w // cells[1]
    share = plane(
        cells,
        lambda a, b: sum((i // rows, j // columns) == (a, b) for i, j in on) / (rows * columns),
    )
    query = {True: [0.0] * len(f), False: [0.0] * len(f)}
    for a in range(cells[0]):
        for b in range(cells[1]):
            for d, channel in enumerate(f):
                query[True][d] += share[a][b] * channel[a][b]
                query[False][d] += (1 - share[a][b]) * channel[a][b]

    def value(a, b):
        vector = [channel[a][b] for channel in f]
        return cosine(vector, query[True]) - cosine(vector, query[False])

    return plane(cells, value)


def box_pixels(box, image_size):
    x1, y1, x2, y2 = box
    rows = [i for i in range(image_size[0]) if y1 <= i + 0.5 < y2]
    columns = [j for j in range(image_size[1]) if x1 <= j + 0.5 < x2]
    if not rows or not columns:
        rows = [min(max(math.floor((y1 + y2) / 2), 0), image_size[0] - 1)]
        columns = [min(max(math.floor((x1 + x2) / 2), 0), image_size[1] - 1)]
    return [(i, j) for i in rows for j in columns]


def uncrop(zoomed, values, box, image_size, moved):  # -> {(i, j): value}
    left, top, right, bottom = zoomed.view
    x1, y1, x2, y2 = zoomed.box
    found = {}
    for i, j in box_pixels(box, image_size):
        p, r = (j + 0.5 - x1) / (x2 - x1), (i + 0.5 - y1) / (y2 - y1)
        x = x1 + (x2 - x1) * (moved[0] + p * (1 - moved[0] - moved[2]))
        y = y1 + (y2 - y1) * (moved[1] + r * (1 - moved[1] - moved[3]))
        found[i, j] = at(values, (y - top) / (bottom - top), (x - left) / (right - left))
    return found


def logit(p):
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


def ellipse(zoomed, pixels):
    x1, y1, x2, y2 = zoomed.box

    def radius(p):
        u = (2 * (p[1] + 0.5) - x1 - x2) / (x2 - x1)
        v = (2 * (p[0] + 0.5) - y1 - y2) / (y2 - y1)
        return u * u + v * v

    least = min(radius(p) for p in pixels)
    return {p for p in pixels if radius(p) < 1 + 1 / 3 or radius(p) == least}


def image_log_odds(f, boxes, labels, image_size, weight=None):  # -> {class: [H][W]}
    classes = max(labels) if weight is None else len(weight) - 1
    own = {"grid_size": 4, "overlaps": "equal", "background_prior": 0.0}
    options = {**reference_labels.DEFAULTS, **own}
    args = (f, weight, boxes, labels, image_size, classes, options)
    found = reference_labels.unaries(*args)[2]

    def value(c, i, j):
        p = found[i][j]
        odds = (len(p) - 1) * p.get(c, 0.0) / p[0]
        return min(max(math.log(odds), -6.0), 6.0) if odds > 0 else -6.0

    return {c: plane(image_size, lambda i, j, c=c: value(c, i, j)) for c in set(labels)}


def instances(image, boxes, labels, backbone, crf, side, stretch=0.15, weight=None):
    """-> masks, retrieved (sets of pixels), log-odds, (dicts), classes, reliable ([H][W])."""
    size = len(image[0]), len(image[0][0])
    shown = crop_size(*size, min(7 * side // 4, math.isqrt(size[0] * size[1])))
    f = backbone([resized(channel, shown) for channel in image])
    shrunken = []
    for x1, y1, x2, y2 in boxes:
        (left, right), (top, bottom) = clipped(x1, x2, size[1]), clipped(y1, y2, size[0])
        shrunken.append([left, top, right, bottom])
    whole = image_log_odds(f, shrunken, labels, size, weight)
    masks, retrieved, odds, area = [], [], [], []
    for box, label in zip(boxes, labels, strict=True):
        z = Zoomed(image, box, backbone, whole[label], side)
        q = crf([[1 / (1 + math.exp(-x)) for x in row] for row in z.odds])
        found = uncrop(z, q, box, size, gaps(z, q, stretch))
        masks.append({p for p, x in found.items() if x > 0.5} or ellipse(z, list(found)))
        odds.append({p: logit(x) for p, x in found.items()})
        back = uncrop(z, difference(z, q), box, size, [0.0] * 4)
        retrieved.append({p for p, x in back.items() if x > 0})
        area.append((z.box[2] - z.box[0]) * (z.box[3] - z.box[1]))

    def front(k, p):
        return odds[k][p] - math.log(area[k])

    before = [set(mask) for mask in masks]
    for k, own in enumerate(before):
        rivals = [n for n in range(len(boxes)) if n != k and labels[n] == labels[k]]
        given = {
            p for p in own if any(p in before[n] and front(n, p) > front(k, p) for n in rivals)
        }
        if given != own:
            masks[k] = own - given
            retrieved[k] = retrieved[k] - given
    classes, reliable = plane(size, lambda i, j: 0), plane(size, lambda i, j: True)
    for i in range(size[0]):
        for j in range(size[1]):
            holding = [k for k in range(len(boxes)) if (i, j) in masks[k]]
            if holding:
                classes[i][j] = labels[max(holding, key=lambda k: front(k, (i, j)))]
            agreed = all(
                ((i, j) in masks[k]) == ((i, j) in retrieved[k]) for k in range(len(boxes))
            )
            reliable[i][j] = agreed and len({labels[k] for k in holding}) <= 1
    return masks, retrieved, odds, classes, reliable


# --------------------------------------------------------------------------------------- refinement


def box_mask_loss(logits, lab, valid, pairs):  # of one box: [28][28], [3][28][28], [28][28]
    n = 28
    place = [((k + 0.5) / n * 2 - 1) * 1.3 for k in range(n)]
    box = plane((n, n), lambda i, j: abs(place[i]) < 1 and abs(place[j]) < 1)
    p = plane((n, n), lambda i, j: 1 / (1 + math.exp(-logits[i][j])))
    loss = 0.0
    for turned in (False, True):
        shared, mine, its = 0.0, 0.0, 0.0
        for a in range(n):
            line = [(b, a) if turned else (a, b) for b in range(n)]
            most = max(p[i][j] * box[i][j] for i, j in line)
            side = max(float(box[i][j]) for i, j in line)
            shared, mine, its = shared + most * side, mine + most**2, its + side**2
        loss += (1 - (2 * shared + 1) / (mine + its + 1)) / 2
    every = [(i, j) for i in range(n) for j in range(n)]
    outside = [(i, j) for i, j in every if not box[i][j] and valid[i][j]]
    loss += sum(-math.log(1 - p[i][j]) for i, j in outside) / max(len(outside), 1)
    total, count = 0.0, 0
    for i, j in every:
        for y, x in ((0, 2), (2, 0), (2, 2), (2, -2)):
            k, m = i + y, j + x
            if not (0 <= k < n and 0 <= m < n and valid[i][j] and valid[k][m]):
                continue
            gap = math.sqrt(sum((c[i][j] - c[k][m]) ** 2 for c in lab))
            if math.exp(-gap / 2) > 0.3 and (box[i][j] or box[k][m]):
                total -= math.log(p[i][j] * p[k][m] + (1 - p[i][j]) * (1 - p[k][m]))
                count += 1
    return loss + pairs * total / max(count, 1)
