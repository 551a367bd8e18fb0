"""The losses on pseudo labels (Eq. 10-14, suppl. Eq. 4-8) as loops, like ``reference.py``."""

import math

from reference import bilinear, dot, log_softmax, positions, ratio, size_of, vector_at

# ------------------------------------------------------------------------------- Eq. 10-14: losses


def confidence(cosines, label, gamma):  # [C] of one position -> sigma (Eq. 11-12)
    d = [max(1 + s, 0.0) for s in cosines]
    return ratio(d[label], max(d)) ** gamma


def pixels(scores, similarity, y_crf, y_ret, ignore_index=255, align_corners=False):
    # of a batch: scores [B][C][h][w], similarity [B][C][h'][w'] or None, labels [B][H][W]
    # -> for every labelled pixel (log H [C], cosines [C], label, reliable)
    found = []
    for b in range(len(y_crf)):
        size = size_of(y_crf[b])
        z = [bilinear(plane, size, align_corners) for plane in scores[b]]
        s = [bilinear(plane, size, align_corners) for plane in (similarity or scores)[b]]
        for i, j in positions(size):
            label = y_crf[b][i][j]
            if label != ignore_index:
                log_h = log_softmax(vector_at(z, i, j))
                found.append((log_h, vector_at(s, i, j), label, label == y_ret[b][i][j]))
    return found


def mean(values):
    return sum(values) / len(values) if values else 0.0


def cross_entropy_part(found):  # Eq. 10
    return mean([-log_h[label] for log_h, _, label, reliable in found if reliable])


def noise_aware_loss(found, gamma=7.0, balance=0.1):  # Eq. 13-14
    terms = [(confidence(s, c, gamma), -log_h[c]) for log_h, s, c, ok in found if not ok]
    weighted = ratio(sum(a * b for a, b in terms), sum(a for a, _ in terms))
    return cross_entropy_part(found) + balance * weighted


def entropy_regularization_loss(found, balance=0.1):  # suppl. Eq. 4-5
    entropies = [-sum(math.exp(x) * x for x in log_h) for log_h, _, _, ok in found if not ok]
    return cross_entropy_part(found) + balance * mean(entropies)


def bootstrapping_loss(found, beta, balance=0.1, targets=None):  # suppl. Eq. 6-8
    # targets: the H of the E-step, one [C] for each found pixel; by default the model's own
    targets = targets or [[math.exp(x) for x in log_h] for log_h, *_ in found]
    terms = []
    for (log_h, _, label, ok), h in zip(found, targets, strict=True):
        if not ok:
            y = [beta * (c == label) + (1 - beta) * h[c] for c in range(len(h))]
            terms.append(-dot(y, log_h))
    return cross_entropy_part(found) + balance * mean(terms)


def poly_schedule(step, total, power=0.9):
    return (1 - step / total) ** power
