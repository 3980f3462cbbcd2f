from training.terminal import secure


def main() -> int:
    """Returns the exit code: the command's; 130 after Ctrl-C, which may come while torch is imported, for seconds."""
    try:
        from .command import main as compare

        return compare()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    secure()
    raise SystemExit(main())
