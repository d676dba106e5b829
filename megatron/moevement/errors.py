"""Errors that a user can act on: one line that names the flag or file, and the remedy."""


class MoevementError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MoevementError):
    """A flag, or a combination of flags, that can't be honoured. Ends the program with exit code 2."""


class UnsupportedError(ConfigError):
    """A layer type, optimizer or parallel mode that sparse checkpointing doesn't support; refused at start."""


class DataError(MoevementError):
    """Training data that can't be used, found by the rank that reads it."""


class StoreError(MoevementError):
    """Host memory for slots that can't be created, opened or used; the message names the file."""


class SlotInvalid(MoevementError):
    """A slot that must not be used: torn, short, stale, foreign or with a wrong digest."""


class TranscriptInvalid(MoevementError):
    """A boundary transcript, or a record of one, that must not be used: torn, stale, foreign, flipped or incomplete."""


class RecoveryError(MoevementError):
    """A recovery that can't be exact. The message says what is lost and what to do."""


class AgreementError(MoevementError):
    """Ranks that should hold the same value do not."""


class PeerLost(MoevementError):
    """The current generation of process groups has failed: leave it and go on in the next one."""


class JobStopped(MoevementError):
    """The job was told to stop and has done so after an iteration, on all ranks, with everything saved."""


class JobEnded(MoevementError):
    """The job stops cleanly, for the reason in the message; what must outlive this process is persisted now."""
