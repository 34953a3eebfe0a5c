"""The schema of version 0.1.  A table that is there stays as it is: databases from before there were migrations begin here too."""

import sqlalchemy as sa
from alembic import op

revision = "quotas_0001"
down_revision = None


def upgrade() -> None:
    """Make the table of what was handed in."""
    op.create_table(
        "handed_in",
        sa.Column("owner", sa.LargeBinary, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("at", sa.Integer, nullable=False),
        sa.Column("amount", sa.Integer, nullable=False),
        if_not_exists=True,
    )
    op.create_index("handed_in_by", "handed_in", ["owner", "kind", "at"], if_not_exists=True)
