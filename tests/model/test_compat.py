import pytest

from vreflection.model.compat import check_transformers_version


@pytest.mark.parametrize("version", ["5.5.4", "5.5.4.dev0", "5.10.0", "5.17.0", "6.0", "6.0.0rc1", "10.1"])
def test_supported_versions(version):
    check_transformers_version(version)


@pytest.mark.parametrize("version", ["5.3.0", "5.5.0", "5.5.3"])
def test_versions_that_rotate_images_wrongly(version):
    with pytest.raises(
        ImportError, match=rf"transformers {version} rotates still images wrongly; .*5\.5\.4.*pip install"
    ):
        check_transformers_version(version)


@pytest.mark.parametrize("version", ["4.57", "4.57.1", "5.2.9", "unknown"])
def test_older_versions(version):
    with pytest.raises(ImportError, match="lacks interfaces"):
        check_transformers_version(version)
