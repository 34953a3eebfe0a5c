"""Everything that can go wrong, and what a caller may do about it.  This module imports nothing.

    VeilmartError                       exit 1
    ├── UsageError                      exit 2    a file, option or configuration is wrong
    │   ├── RecordError                 exit 2    a data file: missing, empty, bad line, too few records
    │   └── PopulationConflict          exit 2    another population or privacy unit than the ledger's, or records that another one charges
    ├── FormatError                     exit 7    bytes from outside are not what the protocol says
    │   └── UnsupportedVersion          exit 7
    ├── FeatureNormError                exit 1    a vector is longer than the bound its privacy proof needs
    ├── ModelError                      exit 2    base model or its wheel: missing, or another hash than expected
    ├── NotAdmitted                     exit 7    a specification that no honest owner under the market's policy would release
    ├── OutsideWindow                   exit 7    a release whose days are over, or have not begun
    ├── IncompatibleSpecification       exit 2    another map, dimension or parameter set
    ├── InvalidSignature                exit 7
    ├── InvalidProof                    exit 7    the log does not hold what it should, or was rewritten
    ├── InvalidAdapter                  exit 7    wrong digest, wrong shapes, weights that are not finite
    ├── BudgetSpent                     exit 5    the ledger refused; nothing was drawn, nothing was spent
    ├── LedgerBehind                    exit 5    the ledger does not know releases that were made: repair it before anything is drawn
    ├── LedgerDamaged                   exit 7    an entry of the ledger is not the one that was written
    ├── CheckFailed                     exit 4    what was to be checked does not hold: a claim, or this machine
    ├── NotFound                        exit 3    no such release, adapter, or no match
    ├── AlreadyPublished                exit 1
    ├── StaleCatalogue                  exit 6    the market's catalogue changed under the query: sync and ask again
    ├── QuotaExceeded                   exit 6    a limit of the market; try later
    ├── Unauthorised                    exit 7
    ├── MarketUnreachable               exit 6
    │   └── UntrustedMarket             exit 7    whoever answers there is not certified by the authority that was given
    ├── CohortAborted                   exit 7    a round of a cohort in which something does not fit: this member says nothing more in it
    ├── TrainingFailed                  exit 1    a loss that is no number: nothing was released
    ├── GuardUnreachable                exit 6    nobody answers at the guard's socket, or it turned us away
    └── CampaignFailed                  exit 1

A message says what was expected, what came and what to do.  It never holds private content: no record text, vector, key or score.
"""

from __future__ import annotations


class VeilmartError(Exception):
    """Root of every error that veilmart raises on purpose; `hint` is one line that says what to do next."""

    code = "unexpected"
    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(VeilmartError):
    """A command, option or configuration cannot be used as given."""

    code, exit_code = "usage", 2


class TrainingFailed(VeilmartError):
    """Training could not come to an adapter: weights that are no numbers, or no memory."""

    code = "training"


class RecordError(UsageError):
    """A data file is missing, empty, malformed, or holds too few records; the message names file and line, never text."""

    code = "records"


class PopulationConflict(UsageError):
    """A ledger belongs to another population or privacy unit, or a record is charged to another population already."""

    code = "population"


class FormatError(VeilmartError):
    """Bytes from outside do not follow the protocol."""

    code, exit_code = "format", 7


class UnsupportedVersion(FormatError):
    """The bytes are of a version this build does not read."""

    code = "format.version"


class FeatureNormError(VeilmartError):
    """A feature vector is longer than the bound on which the sensitivity proof rests."""

    code = "features.norm"


class ModelError(VeilmartError):
    """The base model is missing or is not the one that was asked for."""

    code, exit_code = "model", 2


class IncompatibleSpecification(VeilmartError):
    """Two objects belong to different maps, dimensions or parameter sets."""

    code, exit_code = "specification.incompatible", 2


class NotAdmitted(VeilmartError):
    """A specification is outside the admission policy: no honest owner under it would have released these numbers."""

    code, exit_code = "specification.not-admitted", 7


class OutsideWindow(VeilmartError):
    """A release does not hold today: its days are over, or have not begun."""

    code, exit_code = "release.window", 7


class InvalidSignature(VeilmartError):
    """A signature does not verify."""

    code, exit_code = "signature", 7


class InvalidProof(VeilmartError):
    """A proof of the log does not verify: an entry is not in it, or what was there before is not any more."""

    code, exit_code = "log.proof", 7


class InvalidAdapter(VeilmartError):
    """An adapter's bytes do not have the digest, the shapes or the finite weights that its release promises."""

    code, exit_code = "adapter", 7


class BudgetSpent(VeilmartError):
    """The ledger refused a release; nothing was drawn and nothing was spent."""

    code, exit_code = "budget.refused", 5

    def __init__(self, asked: float, spent: float, limit: float) -> None:
        super().__init__(
            f"privacy budget refused: asked {asked:.2f}, spent {spent:.2f} of {limit:.2f} (epsilons compose below their sum)",
            hint="ask for a smaller --epsilon, or raise --budget if your data officer agrees",
        )
        self.asked, self.spent, self.limit = asked, spent, limit


class LedgerBehind(VeilmartError):
    """The ledger does not know releases that were made under its key, or may not: it was restored and not compared since."""

    code, exit_code = "ledger.behind", 5


class LedgerDamaged(VeilmartError):
    """The hash chain of the ledger does not verify: an entry was changed, removed or added by something else than a charge."""

    code, exit_code = "ledger.damaged", 7


class CheckFailed(VeilmartError):
    """A check that was asked for did not hold."""

    code, exit_code = "check.failed", 4


class NotFound(VeilmartError):
    """There is no such object, or nothing suitable."""

    code, exit_code = "not-found", 3


class AlreadyPublished(VeilmartError):
    """The owner published other bytes under the same release number."""

    code = "already-published"


class StaleCatalogue(VeilmartError):
    """The market's catalogue changed between sync and query."""

    code, exit_code = "catalogue.stale", 6


class QuotaExceeded(VeilmartError):
    """A limit of the market was reached; trying again after so many seconds is worth it."""

    code, exit_code = "quota", 6

    def __init__(self, message: str, hint: str = "", retry_after_s: int = 1) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class Unauthorised(VeilmartError):
    """The caller may not do this."""

    code, exit_code = "unauthorised", 7


class CohortAborted(VeilmartError):
    """A round of a cohort was not carried as the protocol says; the member who raises this takes no further part in it."""

    code, exit_code = "cohort.aborted", 7


class MarketUnreachable(VeilmartError):
    """The market did not answer in time or not at all."""

    code, exit_code = "market.unreachable", 6


class UntrustedMarket(MarketUnreachable):
    """Somebody answers at the market's address, whose certificate the given authority did not issue for that name and time."""

    code, exit_code = "market.untrusted", 7


class GuardUnreachable(VeilmartError):
    """No guard answers at a socket, or it does not let us in."""

    code, exit_code = "guard.unreachable", 6


class CampaignFailed(VeilmartError):
    """A campaign ended without the releases it was run for."""

    code = "campaign"
