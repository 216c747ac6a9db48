package probe

// Reason explains why an endpoint is never answered. The zero Reason means that it may be.
type Reason struct {
	Code ReasonCode
	Text string // for people
}

// ReasonCode classifies reasons, for programs.
type ReasonCode string

// Codes of reasons.
const (
	ReasonKind       ReasonCode = "kind"         // HTTPS, gRPC or exec
	ReasonHost       ReasonCode = "host"         // another host is probed, or perhaps another one
	ReasonTooLong    ReasonCode = "too_long"     // the request exceeds the kernel side's limit
	ReasonRequest    ReasonCode = "request"      // the request cannot be sent, or is not understood
	ReasonStartup    ReasonCode = "startup"      // only startup probes ask it
	ReasonBeside     ReasonCode = "beside"       // answering it would also answer an endpoint that must not be answered
	ReasonPod        ReasonCode = "pod"          // the pod is being deleted, has ended, or its spec is not understood
	ReasonMode       ReasonCode = "mode"         // mode observe or off
	ReasonAnnotation ReasonCode = "annotation"   // an annotation is invalid
	ReasonRoom       ReasonCode = "room"         // the pod has more endpoints than the kernel side has room for
	ReasonVerdict    ReasonCode = "disagreement" // the kubelet's verdict contradicts what was observed
)

// ReasonCodes returns all codes.
func ReasonCodes() []ReasonCode {
	return []ReasonCode{
		ReasonKind, ReasonHost, ReasonTooLong, ReasonRequest, ReasonStartup, ReasonBeside, ReasonPod,
		ReasonMode, ReasonAnnotation, ReasonRoom, ReasonVerdict,
	}
}
