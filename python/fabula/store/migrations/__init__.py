"""Schema versions, oldest first in versions/; alembic runs them."""
