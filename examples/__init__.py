"""Programs that use Trilith."""
