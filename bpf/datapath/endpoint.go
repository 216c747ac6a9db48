package datapath

import "fmt"

// The types that the kernel side shares, as generated from bpf/abi.h, where their fields are explained. Times are
// nanoseconds of CLOCK_BOOTTIME (see Now).
type (
	// Evidence is what was last observed of an endpoint, and until when it may be answered. Pod sets its seal.
	Evidence = probeletEvidence
	// Tally is what the programs note of an endpoint.
	Tally = probeletTally
)

// Question is a request, whole, as the kernel tells it from others: by two independent hashes of its bytes under keys that
// are drawn when the programs are loaded. That two different requests have the same Hash has a probability of 2^-32 at the
// most, the same Question 2^-64. The zero value is no question.
type Question struct{ Hash, Check uint64 }

// EndpointKey names an endpoint of a pod, or with KindPort a port as a whole.
type EndpointKey struct {
	Hash uint64 // of the Question; its Check is in the endpoint's Evidence
	Port uint16
	Kind uint8
}

// Kinds of an EndpointKey.
const (
	KindPort = uint8(probeletEndpointKindKIND_PORT)
	KindTCP  = uint8(probeletEndpointKindKIND_TCP)
	KindHTTP = uint8(probeletEndpointKindKIND_HTTP)
)

// Results of Evidence.
const (
	ResultUnknown = uint8(probeletEvidenceResultRESULT_UNKNOWN)
	ResultSuccess = uint8(probeletEvidenceResultRESULT_SUCCESS)
	ResultFailure = uint8(probeletEvidenceResultRESULT_FAILURE)
)

// WithdrawalCauses names the values of Tally.WithdrawnCause.
var WithdrawalCauses = map[uint8]string{
	uint8(probeletWithdrawalCauseWITHDRAWN_LISTENER_CLOSED): "listener_closed",
	uint8(probeletWithdrawalCauseWITHDRAWN_RESET):           "reset",
	uint8(probeletWithdrawalCauseWITHDRAWN_STATUS):          "status",
}

// Obstacles names the values of Tally.Obstacle: why a probe was passed on though its evidence was fresh.
var Obstacles = map[uint8]string{
	uint8(probeletObstacleOBSTACLE_NO_LISTENER): "no_listener",
	uint8(probeletObstacleOBSTACLE_QUEUE_LONG):  "queue_long",
	uint8(probeletObstacleOBSTACLE_HEAD_OLD):    "head_old",
	uint8(probeletObstacleOBSTACLE_SPECIAL):     "special",
	uint8(probeletObstacleOBSTACLE_REAL_DUE):    "real_due",
	uint8(probeletObstacleOBSTACLE_UNANSWERED):  "unanswered",
}

const (
	// MaxRequest is the longest request, in bytes, that is answered. REQUEST_MAX in bpf/abi.h.
	MaxRequest = 1024
	// MaxAnswers is how many TCP probes in a row are answered at most by looks at the listening socket. ANSWERS_MAX in
	// bpf/listener.h.
	MaxAnswers = 9
	// MaxEndpoints is how many records a pod may have; every probed port takes one too. ENDPOINTS_PER_POD in bpf/abi.h.
	MaxEndpoints = 64
	// takenGrace is TAKEN_GRACE_NS in bpf/abi.h.
	takenGrace = 1_000_000_000
)

// PortKey names a port as a whole.
func PortKey(port uint16) EndpointKey { return EndpointKey{Port: port, Kind: KindPort} }

// TCPKey names the endpoint of a TCP probe.
func TCPKey(port uint16) EndpointKey { return EndpointKey{Port: port, Kind: KindTCP} }

// HTTPKey names the endpoint of an HTTP probe that asks the question. Its evidence must have the question's Check.
func HTTPKey(port uint16, q Question) EndpointKey {
	return EndpointKey{Port: port, Kind: KindHTTP, Hash: q.Hash}
}

func (k EndpointKey) of(device DeviceKey) probeletEndpointKey {
	return probeletEndpointKey{Hash: k.Hash, Device: device, Port: k.Port, Kind: k.Kind}
}

// packed returns port and kind as struct endpoint_list has them.
func (k EndpointKey) packed() uint32 { return uint32(k.Port)<<16 | uint32(k.Kind) }

// SetReply sets the status that e is answered with. It returns an error unless that is a 2xx.
func (e *probeletEvidence) SetReply(status int) error {
	if status < statusMin || status > statusMax {
		return fmt.Errorf("status %d: only a 2xx is answered", status)
	}
	e.Status = uint16(status)
	return nil
}

// sealOf computes the seal that binds evidence to its key, as seal_of in bpf/evidence.h does.
func sealOf(key probeletEndpointKey, e Evidence) uint64 {
	const fnvOffset, fnvPrime = 0xcbf29ce484222325, 0x100000001b3
	hash := uint64(fnvOffset)
	for _, word := range []uint64{
		key.Hash,
		uint64(key.Device.Ifindex)<<32 | uint64(key.Device.Generation),
		uint64(key.Port)<<32 | uint64(key.Kind)<<24 | uint64(e.Result)<<16 | uint64(e.Status),
		e.ObservedAt,
		e.FreshUntil,
		e.Check,
	} {
		hash = (hash ^ word) * fnvPrime
		hash ^= hash >> 29
	}
	return hash
}

// PortFresh reports whether the kernel may take a connection at its SYN, given the evidence and the tally under the port's
// PortKey. It is the model that the program is tested against.
func PortFresh(port Evidence, tally Tally, now uint64) bool {
	return now < port.FreshUntil && port.ObservedAt > tally.WithdrawnAt
}

// MayAnswer reports whether the kernel may answer the question that e is of with e, on a connection taken at takenAt. The
// tallies are the port's and the endpoint's own. Like PortFresh it is a model.
func MayAnswer(e Evidence, port, endpoint Tally, takenAt, now uint64) bool {
	if e.Result != ResultSuccess || e.ObservedAt <= max(port.WithdrawnAt, endpoint.WithdrawnAt) {
		return false
	}
	return now < e.FreshUntil || (takenAt < e.FreshUntil && now-takenAt < takenGrace)
}
