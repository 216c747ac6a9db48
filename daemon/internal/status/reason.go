package status

import (
	"fmt"
	"strings"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Codes of the reasons why an endpoint's next probe reaches the pod. The codes of package probe, which say why an endpoint is never
// answered, belong to the same set. docs/probeletctl.md lists all of them.
const (
	// Reasons that concern a whole attachment.
	AttachFailed  probe.ReasonCode = "attach_failed"
	NotLoaded     probe.ReasonCode = "not_loaded"
	UnknownDevice probe.ReasonCode = "unknown_device"
	NotSeen       probe.ReasonCode = "not_seen"
	NoDaemon      probe.ReasonCode = "no_daemon"
	NoProbes      probe.ReasonCode = "no_probes"
	NoProber      probe.ReasonCode = "no_prober"
	ProberShared  probe.ReasonCode = "prober_shared"
	AnswersLost   probe.ReasonCode = "answers_lost"

	// Reasons that concern one endpoint, with the names that probelet_estimated_probes_total uses where it has the same reason.
	Unobserved = probe.ReasonCode(probe.WhyUnknown)
	LastFailed = probe.ReasonCode(probe.WhyFailed)
	Threshold  = probe.ReasonCode(probe.WhyThreshold)
	Withdrawn  = probe.ReasonCode(probe.WhyWithdrawn)
	Expired    = probe.ReasonCode(probe.WhyExpired)
	BesideTCP  = probe.ReasonCode(probe.WhyTCP)
	Limit      = probe.ReasonCode(probe.WhyLimit)
	Redirect   = probe.ReasonCode("redirect")
	PortClosed = probe.ReasonCode("port_closed")
	NoTraffic  = probe.ReasonCode("no_traffic")
	// Unclassified stands for a reason that an older daemon recorded without a code.
	Unclassified = probe.ReasonCode("unclassified")
)

// Codes returns all codes, including those of package probe.
func Codes() []probe.ReasonCode {
	return append(probe.ReasonCodes(),
		AttachFailed, NotLoaded, UnknownDevice, NotSeen, NoDaemon, NoProbes, NoProber, ProberShared, AnswersLost,
		Unobserved, LastFailed, Threshold, Withdrawn, Expired, BesideTCP, Limit, Redirect, PortClosed, NoTraffic, Unclassified)
}

// Detached reports whether a reason means that the pod is not attached, and if so, why.
func Detached(r probe.Reason) (why string, detached bool) {
	switch r.Code {
	case AttachFailed, NotLoaded, UnknownDevice:
		return strings.TrimPrefix(r.Text, notAttached), true
	}
	return "", false
}

// ReasonBesideTCP returns why a fresh endpoint is not answered beside a TCP endpoint that is not fresh.
func ReasonBesideTCP(tcp probe.Endpoint, state State) probe.Reason {
	return probe.Reason{Code: BesideTCP, Text: fmt.Sprintf("taking a connection would also answer %s (%s)", tcp, state)}
}

// ReasonPortClosed returns why a fresh endpoint is not answered while its port is closed for answers.
func ReasonPortClosed() probe.Reason {
	return probe.Reason{Code: PortClosed, Text: "the port is not open for answers yet"}
}

// ReasonLimit returns why a fresh endpoint is not answered once the maximum of n probes of its port were answered in a row.
func ReasonLimit(n uint32) probe.Reason {
	return probe.Reason{Code: Limit, Text: fmt.Sprintf("the maximum of %d probes in a row were answered, so the pod must accept one", n)}
}

// ReasonRealDue returns why an endpoint that traffic may vouch for is not answered once n of its probes were answered in a row.
func ReasonRealDue(n uint32) probe.Reason {
	return probe.Reason{Code: Limit, Text: fmt.Sprintf("%d probes in a row were answered, so one must reach the pod, whatever its traffic shows", n)}
}

// text returns what a code means. A code from a newer version stands for itself.
func text(texts map[string]string, code string) string {
	if text, ok := texts[code]; ok {
		return text
	}
	return code
}

// LossText says how lost answers were noticed, given a name from datapath.Losses.
func LossText(loss string) string { return text(losses, loss) }

var losses = map[string]string{
	"syn_repeated":     "a prober repeated its SYN although it had been answered",
	"unacknowledged":   "a prober did not acknowledge the answer to its SYN",
	"request_repeated": "a prober repeated its request although it had been answered",
	"unobserved":       "another program at tc ingress keeps the pod's packets from reaching ours",
}

// WithdrawalText says why the kernel withdrew evidence, given a name from datapath.WithdrawalCauses.
func WithdrawalText(cause string) string { return text(withdrawals, cause) }

var withdrawals = map[string]string{
	"listener_closed": "a listening socket of the pod was closed",
	"reset":           "a probe of the port was refused or reset",
	"status":          "a probe of the port got a status other than 2xx",
}

// ObstacleText says why a probe was passed to the pod although its evidence was fresh, given a name from datapath.Obstacles.
func ObstacleText(obstacle string) string { return text(obstacles, obstacle) }

var obstacles = map[string]string{
	"no_listener": "nothing was listening",
	"queue_long":  "the queue was more than half full",
	"head_old":    "a connection had been waiting for 50 ms",
	"special":     "the socket does not accept every packet",
	"real_due":    "the maximum of probes in a row had been answered",
	"unanswered":  "the pod had answered neither the last connection passed on nor a later one",
}

// WhyText says why probes would have reached the pod in mode answer.
func WhyText(why probe.Why) string { return text(whys, string(why)) }

var whys = map[string]string{
	string(probe.WhyNever):     "to endpoints that are never answered",
	string(probe.WhyUnknown):   "before anything was known",
	string(probe.WhyFailed):    "after a failure",
	string(probe.WhyThreshold): "before enough probes in a row had succeeded",
	string(probe.WhyWithdrawn): "after a listening socket had closed",
	string(probe.WhyExpired):   "after the bound had passed",
	string(probe.WhyTCP):       "because the port's TCP probe was not fresh",
	string(probe.WhyLimit):     "because the maximum of probes in a row had been answered",
}

// DoubtText says why the outcome of connections is uncertain, given a name from evidence.Doubts.
func DoubtText(doubt string) string { return text(doubts, doubt) }

var doubts = map[string]string{
	"unseen":    "not fully observed",
	"no_probe":  "not a probe's request",
	"too_large": "too long to be recorded",
	"disorder":  "with contradictory packets",
	"timing":    "dependent on how the answer arrived",
	"ours":      "answered by probelet elsewhere",
}
