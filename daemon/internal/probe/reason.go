package probe

// Reason is why an endpoint is never answered. The zero Reason means that it may be.
type Reason struct {
	Code ReasonCode
	Text string // for people
}

// ReasonCode classifies reasons, for programs.
type ReasonCode string

// Codes of reasons.
const (
	ReasonKind       ReasonCode = "kind"         // HTTPS, gRPC or exec
	ReasonHost       ReasonCode = "host"         // another host is probed, or it is not certain which
	ReasonTooLong    ReasonCode = "too_long"     // the request
	ReasonRequest    ReasonCode = "request"      // it cannot be sent, or is not understood
	ReasonStartup    ReasonCode = "startup"      // only startup probes ask
	ReasonBeside     ReasonCode = "beside"       // answering it would answer another one that is never answered
	ReasonPod        ReasonCode = "pod"          // it is being deleted, has ended, or its specs are not understood
	ReasonMode       ReasonCode = "mode"         // observe or off
	ReasonAnnotation ReasonCode = "annotation"   // one that cannot be used
	ReasonRoom       ReasonCode = "room"         // the pod has more endpoints than the kernel side has room for
	ReasonVerdict    ReasonCode = "disagreement" // the kubelet's verdict differed from what was observed
)

// ReasonCodes returns all codes.
func ReasonCodes() []ReasonCode {
	return []ReasonCode{
		ReasonKind, ReasonHost, ReasonTooLong, ReasonRequest, ReasonStartup, ReasonBeside, ReasonPod,
		ReasonMode, ReasonAnnotation, ReasonRoom, ReasonVerdict,
	}
}
