"""The operator decides; a request may only add distrust."""

import pytest

from stream_monitor.engine.policy import decide


def test_no_arguments_mean_capture():
    assert decide(None, 10, False).refused_reason == ""
    assert decide({"other": 1}, 10, False).refused_arguments == ()


def test_switching_off_needs_leave():
    denied = decide({"stream_monitor_disable": 1}, 10, client_may_disable=False)
    assert denied.refused_reason == ""
    assert denied.refused_arguments == ("stream_monitor_disable:not_allowed",)
    granted = decide({"stream_monitor_disable": "true"}, 10, client_may_disable=True)
    assert granted.refused_reason == "client_disabled"


def test_untrusted_spans():
    assert decide({"stream_monitor_untrusted": [0, 3, 3, 10]}, 10, False).untrusted == (0, 3, 3, 10)


@pytest.mark.parametrize(
    "spans", [[1], [3, 2], [0, 11], [-1, 2], [0, 5, 4, 6], ["0", "3"], "0,3", [True, 3], [], 4, [0, 0.5]]
)
def test_malformed_spans_are_refused_and_named(spans):
    policy = decide({"stream_monitor_untrusted": spans}, 10, False)
    assert policy.untrusted == ()
    assert policy.refused_arguments == ("stream_monitor_untrusted:malformed",)


def test_unknown_arguments_share_one_counter():
    made_up = {f"stream_monitor_{n}": 1 for n in range(1000)}
    assert decide(made_up, 10, False).refused_arguments == ("other:unknown",)


def test_the_tenant_is_in_the_entry_that_the_operator_named_and_nowhere_else():
    assert decide({"whose": "acme"}, 10, False, "whose").tenant == "acme"
    assert decide({"stream_monitor_tenant": "acme"}, 10, False, "stream_monitor_tenant").tenant == "acme"
    unnamed = decide({"stream_monitor_tenant": "acme", "whose": "acme"}, 10, False)
    assert (unnamed.tenant, unnamed.refused_arguments) == ("", ("stream_monitor_tenant:not_allowed",))
    # A client's own entry beside the gateway's.
    both = decide({"stream_monitor_tenant": "beta", "whose": "acme"}, 10, False, "whose")
    assert (both.tenant, both.refused_arguments) == ("acme", ("stream_monitor_tenant:not_allowed",))


@pytest.mark.parametrize("arguments", [None, {}, {"other": 1}])
def test_a_tenant_that_the_gateway_forgot_is_counted(arguments):
    policy = decide(arguments, 10, False, "whose")
    assert (policy.tenant, policy.refused_arguments) == ("", ("stream_monitor_tenant:missing",))


@pytest.mark.parametrize("said", ["a b", "a" * 65, 7, ["acme"], "täter", "*"])
def test_what_is_no_tenant_is_nobody_and_counted(said):
    policy = decide({"whose": said}, 10, False, "whose")
    assert (policy.tenant, policy.refused_arguments) == ("", ("stream_monitor_tenant:malformed",))
