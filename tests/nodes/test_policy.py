"""The policy file: every key checked, and every mistake named by file and key."""

import re

import pytest

from nodes.cohort import CohortRules
from nodes.policy import EXAMPLE, AdapterRelease, RelayRules, read_policy
from protocol.errors import UsageError
from protocol.privacy import MAX_EPSILON


def policy_of(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return read_policy(path)


def test_the_example_has_every_key_and_is_read(tmp_path):
    policy = policy_of(tmp_path, EXAMPLE)
    assert (policy.limits.budget.epsilon, policy.limits.minimum_records, policy.adapter) == (4.0, 100, AdapterRelease.RELAY)
    assert (policy.service.slot_s, policy.service.orders_per_hour, policy.schedule.every.days) == (3600, 60, 30)
    assert policy.relay == RelayRules()
    assert policy.cohort == CohortRules("joint-notes", frozenset())


def test_what_is_left_out_is_careful(tmp_path):
    policy = policy_of(tmp_path, "[specification]\nepsilon_for_life = 2.0\n")
    assert (policy.adapter, policy.service.slot_s, policy.schedule, policy.service.uids) == (AdapterRelease.NONE, 3600, None, frozenset())
    assert (policy.relay, policy.cohort) == (None, None)


MISTAKES = {
    "no budget": ("epsilon_for_life = 4.0", "", "specification.epsilon_for_life"),
    "a budget of nan": ("epsilon_for_life = 4.0", "epsilon_for_life = nan", "specification.epsilon_for_life"),
    "no number": ("largest_epsilon = 1.0", 'largest_epsilon = "1"', "specification.largest_epsilon"),
    "true": ("minimum_units = 100", "minimum_units = true", "specification.minimum_units"),
    "the smallest above the largest": ("smallest_epsilon = 0.05", "smallest_epsilon = 1.5", "specification.smallest_epsilon"),
    "a key of no meaning": ("gids = []", "gids = []\nguids = []", "service.guids"),
    "a table of no meaning": ("[service]", "[sevice]", "sevice"),
    "another adapter": ('release = "relay"', 'release = "all"', "adapter.release"),
    "a negative slot": ("slot_s = 3600", "slot_s = -1", "service.slot_s"),
    "no orders": ("orders_per_hour = 60", "orders_per_hour = 0", "service.orders_per_hour"),
    "names for numbers": ("uids = []", 'uids = ["app"]', "service.uids"),
    "questions without an adapter": ('release = "relay"', 'release = "none"', "adapter.release"),
    "askers that are no keys": ("askers = []", 'askers = ["city"]', "relay.askers"),
    "no questions": ("questions_per_hour = 60", "questions_per_hour = 0", "relay.questions_per_hour"),
    "answers without end": ("most_tokens = 256", "most_tokens = 4096", "relay.most_tokens"),
    "a cohort with a path for a name": ('name = "joint-notes"', 'name = "../x"', "cohort"),
    "members that are no keys": ("members = []", 'members = ["city"]', "cohort.members"),
    "fewer colluders than none": ("colluders = 1", "colluders = -1", "cohort.colluders"),
    "a cohort of persons": ('unit = "record"', 'unit = "person"', "cohort.name"),
    "no date": ("first = 2027-01-01", 'first = "soon"', "schedule.first"),
    "a schedule beyond the limit": ("epsilon = 0.5", "epsilon = 1.5", "schedule.epsilon"),
    "a population that is a path": ('name = "default"', 'name = "../x"', "population.name"),
    "no TOML": ("[accept]", "[accept", "not TOML"),
}


@pytest.mark.parametrize(("there", "instead", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_and_named(tmp_path, there, instead, named):
    assert there in EXAMPLE
    with pytest.raises(UsageError, match=rf"policy\.toml: .*{re.escape(named)}|policy\.toml: {re.escape(named)}"):
        policy_of(tmp_path, EXAMPLE.replace(there, instead, 1))


def test_a_map_or_model_that_is_not_named_is_not_accepted(tmp_path):
    policy = policy_of(tmp_path, EXAMPLE.replace("base_models = []", 'base_models = ["ab"]'))
    policy.require_accepted("kme-lin-96", "00", "ab")
    with pytest.raises(UsageError, match=r"accept\.maps"):
        policy.require_accepted("kme-rff-256", "00", "ab")
    with pytest.raises(UsageError, match=r"accept\.base_models"):
        policy.require_accepted("kme-lin-96", "00", "cd")


GUARANTEED = '[specification]\nepsilon_for_life = 9.0\n[adapter]\nrelease = "relay"\nepsilon = {}\nrequire_guarantee = {}\n{}\n'


def test_a_policy_may_ask_for_a_guarantee_of_adapters_and_bound_it(tmp_path):
    def largest(*written):
        return policy_of(tmp_path, GUARANTEED.format(*written)).limits.largest_adapter_epsilon

    assert largest("8", "true", "largest_epsilon = 8") == 8.0
    assert largest("8", "true", "") == MAX_EPSILON
    assert largest('"none"', "false", "") is None
    nothing = policy_of(tmp_path, GUARANTEED.format('"none"', "true", "").replace("relay", "none"))
    assert nothing.limits.largest_adapter_epsilon == MAX_EPSILON, "no adapter at all is no adapter without a guarantee"


BAD_GUARANTEES = {
    "none, where one is asked for": ('"none"', "true", "", "adapter.epsilon"),
    "beyond the largest": ("8", "true", "largest_epsilon = 4", "adapter.epsilon"),
    "a largest that binds nobody": ('"none"', "false", "largest_epsilon = 4", "adapter.require_guarantee"),
    "no truth": ("8", "1", "", "adapter.require_guarantee"),
    "a text": ("8", '"true"', "", "adapter.require_guarantee"),
    "no number": ("8", "true", "largest_epsilon = inf", "adapter.largest_epsilon"),
    "none as the largest": ("8", "true", 'largest_epsilon = "none"', "adapter.largest_epsilon"),
}


@pytest.mark.parametrize(("epsilon", "asked", "largest", "named"), BAD_GUARANTEES.values(), ids=BAD_GUARANTEES)
def test_what_asks_for_a_guarantee_and_makes_none_is_refused_and_named(tmp_path, epsilon, asked, largest, named):
    with pytest.raises(UsageError, match=rf"policy\.toml: {re.escape(named)}"):
        policy_of(tmp_path, GUARANTEED.format(epsilon, asked, largest))


LIFE = "[specification]\nepsilon_for_life = 9.0\n[adapter]\n"


@pytest.mark.parametrize(("written", "epsilon"), [('"none"', "none"), ("8", "8.0"), ("0.5", "0.5")])
def test_the_epsilon_of_adapters_is_a_number_or_none(tmp_path, written, epsilon):
    assert policy_of(tmp_path, f'{LIFE}release = "public"\nepsilon = {written}\n').adapter_epsilon == epsilon


@pytest.mark.parametrize("written", ['"8"', '"much"', "inf", "nan", "-1", "0", "true", "[1]"])
def test_any_other_epsilon_of_adapters_is_an_error_that_names_file_and_key(tmp_path, written):
    with pytest.raises(UsageError, match=r"policy\.toml: adapter\.epsilon"):
        policy_of(tmp_path, f"{LIFE}epsilon = {written}\n")
