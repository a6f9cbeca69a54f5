"""What pip is told about indexes reaches uv, unless uv was told itself."""

import ssl
import sys

from index_settings import has_own_index, pip_settings, system_certificates, uv_variables


def test_pip_settings_become_uv_variables():
    pip = {
        "index-url": "https://mirror.example/simple",
        "extra-index-url": "https://one.example/simple\nfile:///two/simple",
        "find-links": "/wheels https://three.example/",
        "cert": "/ca.pem",
        "proxy": "http://proxy.example:3128",
        "trusted-host": "mirror.example",
    }
    assert uv_variables(pip, {}) == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://one.example/simple file:///two/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,https://three.example/",
        "SSL_CERT_FILE": "/ca.pem",
        "ALL_PROXY": "http://proxy.example:3128",
        "UV_INSECURE_HOST": "mirror.example",
    }


def test_what_uv_was_told_itself_stays():
    pip = {"index-url": "https://mirror.example/simple", "extra-index-url": "https://one.example", "cert": "/ca.pem"}
    assert uv_variables(pip, {"UV_DEFAULT_INDEX": "https://mine.example", "SSL_CERT_FILE": "/mine.pem"}) == {}


def test_check_lock_asks_only_the_main_index():
    pip = {"index-url": "https://m.example", "extra-index-url": "https://one.example", "find-links": "/wheels"}
    assert uv_variables(pip, {}, find_links=False) == {"UV_DEFAULT_INDEX": "https://m.example"}


def test_pip_settings_are_read_as_pip_ranks_them(tmp_path, monkeypatch):
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://file.example\ntimeout = 7\n[install]\ntimeout = 9\n[download]\ntimeout = 1\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", "https://variable.example")
    found = pip_settings(sys.executable)
    assert found["index-url"] == "https://variable.example"
    assert found["timeout"] == "9"


def test_own_index():
    assert has_own_index({"UV_DEFAULT_INDEX": "https://mirror.example"})
    assert not has_own_index({"UV_INDEX": "https://one.example"})


def test_uv_trusts_what_the_machine_trusts_if_it_has_a_store(tmp_path, monkeypatch):
    """pip asks the machine's store, so behind an inspecting proxy uv failed where pip had just brought it in."""
    store = ssl.get_default_verify_paths()._replace(cafile=None, capath=str(tmp_path))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: store)
    assert system_certificates({}) == {}
    (tmp_path / "company.pem").touch()
    assert system_certificates({}) == {"UV_SYSTEM_CERTS": "true", "UV_NATIVE_TLS": "true"}
    assert system_certificates({"UV_SYSTEM_CERTS": "false"}) == {}
