"""Aggregates: the estimator has the variance it states, sums do not depend on order, and nothing but the honest bytes passes."""

import contextlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from scipy.stats import chi2

from protocol import aggregation
from protocol.aggregation import (
    MAX_DOMAINS,
    MAX_LEAVES,
    NUMBERS,
    OTHERS,
    WEIGHT_SCALE,
    Group,
    State,
    Totals,
    aggregate,
    aggregates_of,
    distance,
    domain_of,
    open_aggregates,
    parse_aggregates,
    require_honest,
    shares_of,
    sign_aggregates,
    tree_of,
)
from protocol.catalogue import centred_means, columns_of
from protocol.codec import decode, encode
from protocol.errors import FormatError, InvalidProof, InvalidSignature
from protocol.features import default_map
from protocol.privacy import NORM_SQUARED, Guarantee
from protocol.release import Card
from protocol.specification import COUNT_STEP, FEATURE_SCALE, Specification, noise_variance
from tests.protocol.worlds import release_of, small_map

FALSE_ALARM = 1e-6
MAP, WIDE = small_map(), default_map()
KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
STATE = State(MAP.map_id, 40, bytes(32), 2, bytes(range(32)))
NAMES = ["finance-a", "finance-b", "health-x", "health.y", "law", "math_1"]


def noisy(
    means: np.ndarray, counts: np.ndarray, epsilons: np.ndarray, rng: np.random.Generator, sampled: bool = True
) -> list[Specification]:
    """Specifications of data sets with these true means, (N, D) around the map's g: sampling as the map has it, noise as epsilon asks.

    Gaussian noise that is rounded stands for the discrete one, whose law the tests of the sampler are about.
    """
    made = []
    for mean, count, epsilon in zip(means, counts, epsilons, strict=True):
        guarantee = Guarantee(float(epsilon), 1e-6)
        variance = noise_variance(guarantee, NORM_SQUARED)
        own = mean + WIDE.task_mean + (rng.normal(0, np.sqrt(WIDE.full.within / count), WIDE.dimension) if sampled else 0)
        exact = np.concatenate([[COUNT_STEP * count], FEATURE_SCALE * count * own])
        sums = np.rint(exact + rng.normal(0, np.sqrt(variance), len(exact))).astype(np.int32)
        made.append(Specification(WIDE.map_id, sums, variance, guarantee))
    return made


def group_of(specifications: list[Specification]) -> Group:
    return Group.of("all", shares_of(specifications, WIDE).sum(axis=0))


def means_like_tasks(count: int, rng: np.random.Generator) -> np.ndarray:
    """True means around g of the length that the map expects of tasks."""
    means = rng.normal(0, 1, (count, WIDE.dimension))
    return means * np.sqrt(WIDE.full.norm) / np.linalg.norm(means, axis=1, keepdims=True) - WIDE.task_mean


# The estimator -----------------------------------------------------------------------------------------------------------


def test_weights_are_the_inverse_variances_that_numpy_gives():
    rng = np.random.default_rng(1)
    specifications = noisy(means_like_tasks(12, rng), rng.integers(50, 5000, 12), rng.choice([0.5, 1, 2], 12), rng)
    columns, constants = columns_of(specifications, WIDE, 2), WIDE.full
    inverse = 1 / (constants.between + constants.within / columns.counts + columns.noise_stds**2)
    group, x = group_of(specifications), centred_means(specifications, WIDE)
    np.testing.assert_allclose(group.mean, np.average(x, axis=0, weights=inverse), atol=1e-5)
    k = inverse * constants.between
    assert group.weight / WEIGHT_SCALE == pytest.approx(k.sum(), abs=1e-5)
    stretch = constants.norm * (columns.count_stds / columns.counts) ** 2 / WIDE.dimension
    stated = (k**2 * (columns.noise_stds**2 + constants.within / columns.counts + stretch)).sum() / k.sum() ** 2
    assert group.variance == pytest.approx(stated, rel=1e-4)
    assert group.effective_units(WIDE) == pytest.approx(constants.within / stated, rel=1e-4)


def squared_errors(specifications: list[Specification], means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    weights = weights / weights.sum()
    return (weights @ centred_means(specifications, WIDE) - weights @ means) ** 2


def test_the_mean_of_a_group_has_the_variance_that_is_stated():
    """250 federations with owners who are nearly all noise; by chi-square, both ways, at a false-alarm rate of 1e-6.

    The bounds are 4.5 % off; nobody knows n~ exactly, so 4 % more are granted.
    """
    rng = np.random.default_rng(2)
    counts, epsilons = np.array([100, 400, 600, 1000, 2000, 100]), np.array([0.5, 1, 2, 1, 1, 0.5])
    ratios, unweighted, stated = [], [], []
    for _ in range(250):
        means = means_like_tasks(len(counts), rng)
        specifications = noisy(means, counts, epsilons, rng)
        group = group_of(specifications)
        weights = shares_of(specifications, WIDE)[:, 2].astype(float)
        ratios.append(squared_errors(specifications, means, weights) / group.variance)
        unweighted.append(squared_errors(specifications, means, np.ones(len(counts))))
        stated.append(group.variance)
    total, degrees = np.sum(ratios), np.size(ratios)
    assert 0.96 * chi2.ppf(FALSE_ALARM / 2, degrees) < total < 1.04 * chi2.isf(FALSE_ALARM / 2, degrees)
    # Control: the plain mean of the same releases has a variance far above.
    plain = np.sum(np.array(unweighted) / np.array(stated)[:, None])
    assert plain > 1.5 * chi2.isf(FALSE_ALARM / 2, degrees)


def test_debiased_distances_of_equal_means_are_zero_on_average_and_biased_ones_are_not():
    rng = np.random.default_rng(3)
    mean = means_like_tasks(1, rng)
    distances, biased = [], []
    for _ in range(300):
        one = group_of(noisy(np.repeat(mean, 3, axis=0), np.array([200, 300, 400]), np.ones(3), rng))
        other = group_of(noisy(np.repeat(mean, 2, axis=0), np.array([500, 150]), np.array([1, 2]), rng))
        found = distance(one, other)
        distances.append(found.squared / found.std)
        biased.append(((one.mean - other.mean) ** 2).sum() / found.std)
    # Within 4.9 standard deviations of the mean of 300, and 0.2 for what nobody knows of n~.
    assert abs(np.mean(distances)) < 4.9 / np.sqrt(300) + 0.2
    assert np.mean(biased) > 3, "control: without the correction noise alone looks like a distance"


def test_a_release_that_claims_ever_so_many_records_weighs_no_more_than_one_that_is_exact():
    rng = np.random.default_rng(4)
    means = means_like_tasks(2, rng)
    shares = shares_of(noisy(means, np.array([300_000, 1000]), np.ones(2), rng), WIDE)
    assert shares[1, 2] > 0.9 * shares[0, 2]
    assert shares[0, 2] <= WEIGHT_SCALE


def test_a_domain_is_what_stands_before_the_first_divider():
    assert [domain_of(name) for name in ("finance-banking77", "ward_notes.v2", "a.b", "notes", "x-")] == [
        "finance",
        "ward",
        "a",
        "notes",
        "x",
    ]


# Sums and the tree -------------------------------------------------------------------------------------------------------


def releases(count: int, seed: int = 0, names: list[str] = NAMES) -> list:
    key = Ed25519PrivateKey.generate()
    made = [release_of(MAP, key, number=n + 1, seed=seed + n % 5, count=60 + 40 * n % 700) for n in range(count)]
    return [replace(release, card=Card(names[n % len(names)])) for n, release in enumerate(made)]


POOL = releases(40)
SHARES = shares_of([release.specification for release in POOL], MAP)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(POOL) - 1), max_size=120))
def test_whatever_came_and_went_in_whatever_order_the_bytes_are_those_from_scratch(flips):
    """Each number puts a release in, or takes it out if it is in."""
    totals, inside = Totals(MAP.dimension), set()
    for at in flips:
        domain = domain_of(POOL[at].card.name)
        if at in inside:
            totals.remove(domain, SHARES[at])
        else:
            totals.add(domain, SHARES[at])
        inside ^= {at}
    there = sorted(inside)
    running = aggregate(
        totals, SHARES[there], [POOL[at].title for at in there], [domain_of(POOL[at].card.name) for at in there], STATE
    )  # fmt: skip
    gone = {release.release_id for at, release in enumerate(POOL) if at not in inside}
    scratch = aggregates_of(POOL, gone, MAP, STATE)
    assert running.body == scratch.body
    assert parse_aggregates(scratch.body).body == scratch.body


def test_control_running_sums_of_doubles_would_depend_on_the_order():
    x = centred_means([release.specification for release in POOL], MAP)
    forward, backward = np.zeros(MAP.dimension), np.zeros(MAP.dimension)
    for row in x:
        forward += row
    for row in x[::-1]:
        backward += row
    assert (forward != backward).any()


def test_shares_do_not_depend_on_what_is_computed_beside_them():
    alone = np.array([shares_of([release.specification], MAP)[0] for release in POOL])
    assert (alone == SHARES).all()


def test_the_tree_is_that_of_an_independent_implementation():
    """Average linkage of scipy on the debiased distances; equal weights."""
    rng = np.random.default_rng(6)
    for count in (2, 3, 20, MAX_LEAVES):
        distances = np.triu(rng.integers(1, 1 << 45, (count, count)), 1)
        distances = distances + distances.T
        ours = aggregation._merged(distances, [WEIGHT_SCALE] * count)
        theirs = linkage(squareform(distances.astype(float)), "average")
        assert [(merge.left, merge.right) for merge in ours] == [tuple(sorted(pair)) for pair in theirs[:, :2].astype(int).tolist()]
        np.testing.assert_allclose([merge.height for merge in ours], theirs[:, 2], rtol=1e-12, atol=1)


def planted(groups: int, each: int, seed: int, epsilon: float = 1.0, spread: float = 1.0) -> tuple[list[Specification], list[int]]:
    """Specifications of kinds, and the kind of each; with a small spread the kinds are related."""
    rng = np.random.default_rng(seed)
    centres, numbers = means_like_tasks(groups, rng), np.repeat(np.arange(groups), each)
    centres = centres[0] + spread * (centres - centres[0])
    rng.shuffle(numbers)
    return noisy(centres[numbers], rng.integers(100, 1500, len(numbers)), np.full(len(numbers), epsilon), rng), numbers.tolist()


def test_the_tree_brings_releases_of_one_kind_together():
    specifications, kinds = planted(6, 5, seed=7)
    leaves, merges = tree_of(shares_of(specifications, WIDE), [f"x@{n:08x}" for n in range(30)], ["x"] * 30)
    under = {leaf: {leaf} for leaf in range(len(leaves))}
    for step, merge in enumerate(merges):
        under[30 + step] = under[merge.left] | under[merge.right]
    for kind in range(6):
        assert {at for at, own in enumerate(kinds) if own == kind} in under.values()
    assert len(leaves) == 30
    assert merges[-1].height > 20 * max(merges[23].height, 1), "24 merges within kinds are low, those between them are high"


def test_noise_that_is_not_taken_off_would_tear_kinds_apart():
    """Control: by distances that noise adds to, noisy members of one kind are further from each other than from a related kind."""
    specifications, kinds = planted(3, 8, seed=8, epsilon=0.5, spread=0.3)
    honest = aggregation._distances(shares_of(specifications, WIDE)) * 2.0**-40
    x = centred_means(specifications, WIDE)
    naive = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    other = ~np.equal.outer(kinds, kinds)
    same = ~other & ~np.eye(len(kinds), dtype=bool)
    assert honest[other].mean() > 4 * abs(honest[same].mean())
    assert naive[other].mean() < 2 * naive[same].mean()
    assert naive[same].max() > naive[other].mean()


def test_of_many_releases_the_tree_has_bounded_leaves_and_holds_all():
    specifications, kinds = planted(9, 60, seed=9)
    titles, domains = [f"k{kind}@{n:08x}" for n, kind in enumerate(kinds)], [f"k{kind}" for kind in kinds]
    shares = shares_of(specifications, WIDE)
    leaves, merges = tree_of(shares, titles, domains)
    assert len(leaves) <= MAX_LEAVES < len(kinds)
    assert sum(leaf.releases for leaf in leaves) == len(kinds)
    assert (leaves, merges) == tree_of(shares, titles, domains)
    members = aggregation._gathered(shares, domains)
    pure = [len({kinds[at] for at in np.flatnonzero(members == leaf)}) == 1 for leaf in range(len(leaves))]
    assert np.mean(pure) > 0.95, "leaves hold one kind"


def test_domains_beyond_the_limit_are_one_group():
    totals = Totals(MAP.dimension)
    for number in range(MAX_DOMAINS + 10):
        for _ in range(1 + (number < 5)):
            totals.add(f"d{number:04}", SHARES[number % len(SHARES)])
    federation, groups = totals.groups()
    assert len(groups) == MAX_DOMAINS
    assert groups[0].name == OTHERS
    assert sum(group.releases for group in groups) == federation.releases == MAX_DOMAINS + 15
    assert {f"d{number:04}" for number in range(5)} <= {group.name for group in groups}, "the largest keep their place"


def test_releases_that_are_all_noise_and_the_longest_names_have_a_statement_too():
    """What one owner may publish must not keep a market from its statement, nor its parser from reading it."""
    guarantee = Guarantee(1e-4, 1e-6)
    wild = [
        Specification(MAP.map_id, np.array(sums, np.int32), noise_variance(guarantee, NORM_SQUARED), guarantee)
        for sums in ([60_000, 2**31 - 1, -(2**31), 2**31 - 1, 5], [-(2**31), 0, 0, 0, 0], [2**31 - 1, 2**31 - 1, 2**31 - 1, -(2**31), 0])
    ]
    made = releases(MAX_LEAVES + 40)
    for at, release in enumerate(made):
        name = f"{'d' * 40}{at % (MAX_DOMAINS + 30):03}-{'x' * 19}"
        specification = wild[at] if at < len(wild) else release.specification
        made[at] = replace(release, card=Card(name), specification=specification)
    honest = aggregates_of(made, (), MAP, replace(STATE, size=len(made)))
    assert parse_aggregates(honest.body).body == honest.body
    few = aggregates_of(made[:5], (), MAP, replace(STATE, size=len(made)))
    assert parse_aggregates(few.body).body == few.body
    assert few.federation.weight > 1.9 * 0.5 * WEIGHT_SCALE, "the two releases that say something are what the mean is made of"


def test_heights_never_fall_where_averages_round_to_one_double():
    rng = np.random.default_rng(13)
    distances = np.triu((1 << 54) + rng.integers(0, 8, (60, 60)), 1)
    merges = aggregation._merged(distances + distances.T, rng.integers(1, 1 << 24, 60).tolist())
    heights = [merge.height for merge in merges]
    assert heights == sorted(heights)


def test_a_market_without_releases_has_aggregates_too():
    empty = aggregates_of([], (), MAP, replace(STATE, size=0))
    again = parse_aggregates(empty.body)
    assert (again.federation.releases, again.domains, again.leaves, again.merges) == (0, (), (), ())
    assert again.federation.effective_units(MAP) == 0


# The statement -----------------------------------------------------------------------------------------------------------

HONEST = aggregates_of(POOL, {POOL[3].release_id}, MAP, STATE)


def forged(change) -> bytes:
    metadata, payload = decode(aggregation.TAG, HONEST.body)
    payload = bytearray(payload)
    change(metadata, payload)
    return encode(aggregation.TAG, metadata, bytes(payload))


def raise_weight(metadata, payload):
    metadata["domains"][0][3] += 1


def move_mean(metadata, payload):
    payload[-1] ^= 1


def hide_release(metadata, payload):
    metadata["domains"][0][1] -= 1
    metadata["leaves"].pop()
    metadata["merges"] = metadata["merges"][:-1]


def swap_titles(metadata, payload):
    first, second = metadata["leaves"][:2]
    first[0], second[0] = second[0], first[0]


def lower_branch(metadata, payload):
    metadata["merges"][-1][2] += 1


def claim_less_noise(metadata, payload):
    metadata["domains"][1][4] //= 2


def keep_what_was_taken_back(metadata, payload):
    whole = decode(aggregation.TAG, aggregates_of(POOL, (), MAP, STATE).body)
    metadata.update(whole[0])
    payload[:] = whole[1]


FORGERIES = [raise_weight, move_mean, hide_release, swap_titles, lower_branch, claim_less_noise, keep_what_was_taken_back]


@pytest.mark.parametrize("change", FORGERIES)
def test_forged_aggregates_are_refused_though_the_market_signed_them(change):
    body = forged(change)
    with pytest.raises((InvalidProof, FormatError)):
        require_honest(open_aggregates(body, sign_aggregates(body, KEY), PUBLIC), POOL, {POOL[3].release_id}, MAP)


def test_without_recomputing_forged_numbers_pass():
    """Control: the signature alone says who said it, not that it is true; and the honest bytes pass the check."""
    passed = 0
    for change in FORGERIES:
        body = forged(change)
        try:
            open_aggregates(body, sign_aggregates(body, KEY), PUBLIC)
            passed += 1
        except FormatError:
            pass
    assert passed >= len(FORGERIES) - 1
    require_honest(open_aggregates(HONEST.body, sign_aggregates(HONEST.body, KEY), PUBLIC), POOL, {POOL[3].release_id}, MAP)


def test_a_signature_of_another_key_or_over_other_bytes_is_refused():
    signature = sign_aggregates(HONEST.body, KEY)
    stranger = Ed25519PrivateKey.generate()
    for body, signed, key in (
        (HONEST.body, sign_aggregates(HONEST.body, stranger), PUBLIC),
        (forged(move_mean), signature, PUBLIC),
        (HONEST.body, signature, stranger.public_key().public_bytes_raw()),
    ):
        with pytest.raises(InvalidSignature):
            open_aggregates(body, signed, key)


MALFORMED = {
    "a domain twice": lambda m: m["domains"].append(m["domains"][0]),
    "a name that is none": lambda m: m["domains"][0].__setitem__(0, "\x1b[2J"),
    "a title that is none": lambda m: m["leaves"][0].__setitem__(0, "notes"),
    "a number that is a text": lambda m: m["domains"][0].__setitem__(1, m["domains"][0][0]),
    "a negative number": lambda m: m["merges"][0].__setitem__(2, -1),
    "a branch twice": lambda m: m["merges"][1].__setitem__(0, m["merges"][0][0]),
    "a branch of the future": lambda m: m["merges"][0].__setitem__(1, 10_000),
    "heights that fall": lambda m: m["merges"][-1].__setitem__(2, 0),
    "a merge too few": lambda m: m["merges"].pop(),
    "more releases than the log": lambda m: m.__setitem__("size", 3),
    "a field more": lambda m: m.__setitem__("x", 1),
    "no list": lambda m: m.__setitem__("merges", "x"),
    "an entry that is no list": lambda m: m["leaves"].__setitem__(0, 7),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed_aggregates_are_refused(change):
    def of_metadata(metadata, payload):
        change(metadata)

    with pytest.raises(FormatError):
        parse_aggregates(forged(of_metadata))


def test_flipped_and_missing_bytes_are_format_errors_or_other_aggregates():
    rng = np.random.default_rng(12)
    for at in rng.integers(0, len(HONEST.body), 400):
        changed = bytearray(HONEST.body)
        changed[at] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(FormatError):
            assert parse_aggregates(bytes(changed)).body == bytes(changed) != HONEST.body
    for length in itertools.chain(range(0, 200, 7), range(len(HONEST.body) - 40, len(HONEST.body))):
        with contextlib.suppress(FormatError):  # what is cut off so that whole numbers are left has another dimension, which no map has
            assert len(parse_aggregates(HONEST.body[:length]).federation.centre) < MAP.dimension


def test_the_bytes_are_those_of_the_documented_form():
    metadata, payload = decode(aggregation.TAG, HONEST.body)
    assert sorted(metadata) == ["domains", "leaves", "merges", "notices", "size"]
    assert [row[0] for row in metadata["domains"]] == ["finance", "health", "law", "math"]
    assert len(payload) == 96 + 4 * MAP.dimension * 5
    assert all(len(row) == NUMBERS + 1 for row in metadata["domains"])
    assert json.dumps(metadata)
