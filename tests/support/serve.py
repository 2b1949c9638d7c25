"""The `skfac` command as a module, so that a test can start it with this Python."""

from skfac.service.main import serve

if __name__ == "__main__":
    import typer

    typer.run(serve)
