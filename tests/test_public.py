"""The public face: every name is there, and none of them costs anything until it is used."""

import subprocess
import sys

import clinometer


def test_every_public_name_loads_and_is_documented():
    for name in clinometer.__all__:
        value = getattr(clinometer, name)
        if name != "__version__":
            assert (value.__doc__ or "").strip(), name
    assert set(dir(clinometer)) >= {"diagnose", "check_gradients", "explain_step", "attribute", "AdamW"}


def test_importing_the_package_imports_neither_torch_nor_numpy():
    script = "import clinometer, sys; assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_help_imports_neither_torch_nor_numpy():
    script = (
        "import sys; sys.argv = ['clinometer', '--help']\n"
        "from clinometer.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'transformers', 'tokenizers', 'plotly'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
