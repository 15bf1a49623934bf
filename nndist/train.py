"""`python -m nndist.train mnist_cnn` is `nndist train mnist_cnn`; `nndist.train` is the function, imported or not."""

import sys

if __name__ == "__main__":
    from .cli.main import main

    main(["train", *sys.argv[1:]])
else:
    from .training.api import train

    sys.modules[__name__] = train  # type: ignore[assignment]  # import then makes it the package's attribute
