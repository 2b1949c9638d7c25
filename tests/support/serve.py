"""The `skfac` command as a module, so that a test can start it with this Python."""

from skfac.service.main import serve

if __name__ == "__main__":
    import faulthandler

    import typer

    faulthandler.enable()  # SIGABRT asks a server that hangs where it does
    typer.run(serve)
