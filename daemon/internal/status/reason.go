package status

import (
	"fmt"
	"strings"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Codes of reasons why the next probe of an endpoint reaches the pod, besides those of package probe, which say why it is never
// answered. docs/probeletctl.md lists them all.
const (
	// Of a whole attachment.
	AttachFailed  probe.ReasonCode = "attach_failed"
	NotLoaded     probe.ReasonCode = "not_loaded"
	UnknownDevice probe.ReasonCode = "unknown_device"
	NotSeen       probe.ReasonCode = "not_seen"
	NoDaemon      probe.ReasonCode = "no_daemon"
	NoProbes      probe.ReasonCode = "no_probes"
	NoProber      probe.ReasonCode = "no_prober"
	ProberShared  probe.ReasonCode = "prober_shared"
	AnswersLost   probe.ReasonCode = "answers_lost"

	// Of an endpoint, named as in probelet_estimated_probes_total where that has the same.
	Unobserved = probe.ReasonCode(probe.WhyUnknown)
	LastFailed = probe.ReasonCode(probe.WhyFailed)
	Threshold  = probe.ReasonCode(probe.WhyThreshold)
	Withdrawn  = probe.ReasonCode(probe.WhyWithdrawn)
	Expired    = probe.ReasonCode(probe.WhyExpired)
	BesideTCP  = probe.ReasonCode(probe.WhyTCP)
	Limit      = probe.ReasonCode(probe.WhyLimit)
	Redirect   = probe.ReasonCode("redirect")
	PortClosed = probe.ReasonCode("port_closed")
	// Unclassified: an older daemon left only the text.
	Unclassified = probe.ReasonCode("unclassified")
)

// Codes returns all codes: those of package probe and those above.
func Codes() []probe.ReasonCode {
	return append(probe.ReasonCodes(),
		AttachFailed, NotLoaded, UnknownDevice, NotSeen, NoDaemon, NoProbes, NoProber, ProberShared, AnswersLost,
		Unobserved, LastFailed, Threshold, Withdrawn, Expired, BesideTCP, Limit, Redirect, PortClosed, Unclassified)
}

// Detached reports whether a reason means that the attachment does not work, and what keeps it from working.
func Detached(r probe.Reason) (why string, detached bool) {
	switch r.Code {
	case AttachFailed, NotLoaded, UnknownDevice:
		return strings.TrimPrefix(r.Text, notAttached), true
	}
	return "", false
}

// ReasonBesideTCP is the reason of a fresh endpoint beside a TCP endpoint that is not.
func ReasonBesideTCP(tcp probe.Endpoint, state State) probe.Reason {
	return probe.Reason{Code: BesideTCP, Text: fmt.Sprintf("taking a connection would also answer %s (%s)", tcp, state)}
}

// ReasonPortClosed is the reason of a fresh endpoint whose port is not open for answers yet.
func ReasonPortClosed() probe.Reason {
	return probe.Reason{Code: PortClosed, Text: "the port is not open yet"}
}

// ReasonLimit is the reason of a fresh endpoint of whose port n probes were answered in a row.
func ReasonLimit(n uint32) probe.Reason {
	return probe.Reason{Code: Limit, Text: fmt.Sprintf("as many probes as may be were answered in a row (%d), so the pod must accept one", n)}
}

// text returns what a code means, or the code if it is of a version that this one does not know.
func text(texts map[string]string, code string) string {
	if text, ok := texts[code]; ok {
		return text
	}
	return code
}

// LossText says how it was noticed that answers do not arrive, by the names of datapath.Losses.
func LossText(loss string) string { return text(losses, loss) }

var losses = map[string]string{
	"syn_repeated":     "a prober sent its SYN again although it had been answered",
	"unacknowledged":   "a prober did not acknowledge the answer to its SYN",
	"request_repeated": "a prober sent its request again although it had been answered",
	"unobserved":       "another program at tc ingress keeps the pod's packets from ours",
}

// WithdrawalText says why the kernel withdrew evidence, by the names of datapath.WithdrawalCauses.
func WithdrawalText(cause string) string { return text(withdrawals, cause) }

var withdrawals = map[string]string{
	"listener_closed": "a listening socket of the pod was closed",
	"reset":           "a probe of the port was refused or reset",
	"status":          "a probe of the port got a status other than 2xx",
}

// ObstacleText says why a TCP probe was passed on, by the names of datapath.Obstacles.
func ObstacleText(obstacle string) string { return text(obstacles, obstacle) }

var obstacles = map[string]string{
	"no_listener": "nothing listened",
	"queue_long":  "the queue was more than half full",
	"head_old":    "a connection had waited for 50 ms",
	"special":     "the socket does not take every packet",
	"real_due":    "as many as may be had been answered",
	"unanswered":  "the pod had not answered the connection before",
}

// WhyText says of probes why they would have reached the pod in mode answer.
func WhyText(why probe.Why) string { return text(whys, string(why)) }

var whys = map[string]string{
	string(probe.WhyNever):     "of what is never answered",
	string(probe.WhyUnknown):   "before anything was known",
	string(probe.WhyFailed):    "after a failure",
	string(probe.WhyThreshold): "before enough had succeeded in a row",
	string(probe.WhyWithdrawn): "after a listening socket had closed",
	string(probe.WhyExpired):   "after the bound",
	string(probe.WhyTCP):       "because the port's TCP probe was not fresh",
	string(probe.WhyLimit):     "because as many as may be had been answered in a row",
}

// DoubtText says of connections why their outcome is not certain, by the names of evidence.Doubts.
func DoubtText(doubt string) string { return text(doubts, doubt) }

var doubts = map[string]string{
	"unseen":    "not seen whole",
	"no_probe":  "not asked as a probe asks",
	"too_large": "longer than what is recorded",
	"disorder":  "contradictory",
	"timing":    "dependent on how the answer arrived",
	"ours":      "answered by probelet elsewhere",
}
