"""The schema of version 0.1.  Tables that are there stay as they are: databases from before there were migrations begin here too."""

import sqlalchemy as sa
from alembic import op

revision = "market_0001"
down_revision = None


def upgrade() -> None:
    """Make the tables of releases, log, notices, witnesses, members and certificates."""
    op.create_table(
        "release",
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("release_id", sa.LargeBinary(32), nullable=False, unique=True),
        sa.Column("owner", sa.LargeBinary(32), nullable=False),
        sa.Column("release_number", sa.Integer, nullable=False),
        sa.Column("envelope", sa.LargeBinary, nullable=False),
        sa.Column("row", sa.LargeBinary(16), nullable=False),
        sa.Column("card", sa.LargeBinary, nullable=False),
        sa.Column("rows_chain", sa.LargeBinary(32), nullable=False),
        sa.Column("terms_size", sa.Integer, nullable=False),
        sa.Column("terms_chain", sa.LargeBinary(32), nullable=False),
        sa.Column("page_chain", sa.LargeBinary(32), nullable=False),
        sa.Column("cards_root", sa.LargeBinary(32), nullable=False),
        sa.UniqueConstraint("owner", "release_number"),
        if_not_exists=True,
    )
    op.create_table(
        "terms",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False, unique=True),
        if_not_exists=True,
    )
    op.create_table(
        "log_node",
        sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "cosigned",
        sa.Column("witness", sa.String, primary_key=True),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("note", sa.LargeBinary, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "notice",
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("owner", sa.LargeBinary(32), nullable=False),
        sa.Column("successor", sa.LargeBinary(32)),
        sa.Column("body", sa.LargeBinary, nullable=False, unique=True),
        if_not_exists=True,
    )
    op.create_table("gone", sa.Column("release_id", sa.LargeBinary(32), primary_key=True), if_not_exists=True)
    op.create_table(
        "invite",
        sa.Column("secret_hash", sa.LargeBinary(32), primary_key=True),
        sa.Column("organisation", sa.String, nullable=False),
        sa.Column("expires", sa.Integer, nullable=False),
        sa.Column("used_by", sa.LargeBinary(32)),
        if_not_exists=True,
    )
    op.create_table(
        "member",
        sa.Column("owner", sa.LargeBinary(32), primary_key=True),
        sa.Column("organisation", sa.String, nullable=False),
        sa.Column("supernode_key", sa.String, nullable=False),
        sa.Column("joined", sa.Integer, nullable=False),
        sa.Column("removed", sa.Integer),
        if_not_exists=True,
    )
    op.create_table(
        "certificate",
        sa.Column("serial", sa.String(40), primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("key_digest", sa.LargeBinary(32), nullable=False),
        sa.Column("issued", sa.Integer, nullable=False),
        sa.Column("ends", sa.Integer, nullable=False),
        sa.Column("revoked", sa.Integer),
        if_not_exists=True,
    )
