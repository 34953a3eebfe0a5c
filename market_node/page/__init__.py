"""The market's page: what a market holds, for people and for programs, read from its database in a process of its own.

    reading      what the database holds, followed as it grows; nothing here can write
    choosing     filters, order and pages of the catalogue
    projection   the map of specifications in two dimensions
    proofs       check a receipt, a conflict or evidence that somebody pastes, with the protocol's own verifier
    condition    whether the market serves, and how it fares
    application  the pages
    serving      the process

Everything shown is public: it was released, signed and logged.  The page holds no key and no secret, and answers GET alone but for the
proof checker, which keeps nothing of what it is given.
"""
