package datapath

import "fmt"

// Types shared with the kernel side, generated from bpf/abi.h, which documents their fields. Times are nanoseconds of
// CLOCK_BOOTTIME (see Now).
type (
	// Evidence states what was last observed of an endpoint, and until when it may be answered. Pod sets its seal.
	Evidence = probeletEvidence
	// Tally holds what the programs note about an endpoint.
	Tally = probeletTally
)

// Question identifies a whole request by two independent hashes of its bytes, under keys drawn when the programs are loaded.
// Two different requests have the same Hash with a probability of at most 2^-32, and the same Question with at most 2^-64. The
// zero value means no question.
type Question struct{ Hash, Check uint64 }

// EndpointKey identifies an endpoint of a pod, or with KindPort a whole port.
type EndpointKey struct {
	Hash uint64 // of the Question, whose Check is in the endpoint's Evidence
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

// WithdrawalCauses maps values of Tally.WithdrawnCause to names.
var WithdrawalCauses = map[uint8]string{
	uint8(probeletWithdrawalCauseWITHDRAWN_LISTENER_CLOSED): "listener_closed",
	uint8(probeletWithdrawalCauseWITHDRAWN_RESET):           "reset",
	uint8(probeletWithdrawalCauseWITHDRAWN_STATUS):          "status",
}

// Obstacles maps values of Tally.Obstacle to names. An obstacle is the reason why a probe was passed on although its evidence was
// fresh.
var Obstacles = map[uint8]string{
	uint8(probeletObstacleOBSTACLE_NO_LISTENER): "no_listener",
	uint8(probeletObstacleOBSTACLE_QUEUE_LONG):  "queue_long",
	uint8(probeletObstacleOBSTACLE_HEAD_OLD):    "head_old",
	uint8(probeletObstacleOBSTACLE_SPECIAL):     "special",
	uint8(probeletObstacleOBSTACLE_REAL_DUE):    "real_due",
	uint8(probeletObstacleOBSTACLE_UNANSWERED):  "unanswered",
}

const (
	// MaxRequest is the length in bytes of the longest request that is answered. REQUEST_MAX in bpf/abi.h.
	MaxRequest = 1024
	// MaxAnswers is the maximum number of consecutive TCP probes that are answered by a look at the listening socket.
	// ANSWERS_MAX in bpf/listener.h.
	MaxAnswers = 9
	// MaxEndpoints is the maximum number of records of a pod. Each probed port takes one, too. ENDPOINTS_PER_POD in bpf/abi.h.
	MaxEndpoints = 64
	// takenGrace is TAKEN_GRACE_NS in bpf/abi.h.
	takenGrace = 1_000_000_000
)

// PortKey returns the key of a whole port.
func PortKey(port uint16) EndpointKey { return EndpointKey{Port: port, Kind: KindPort} }

// TCPKey returns the key of a TCP probe's endpoint.
func TCPKey(port uint16) EndpointKey { return EndpointKey{Port: port, Kind: KindTCP} }

// HTTPKey returns the key of the endpoint of an HTTP probe that asks the question. Its evidence must have the question's Check.
func HTTPKey(port uint16, q Question) EndpointKey {
	return EndpointKey{Port: port, Kind: KindHTTP, Hash: q.Hash}
}

func (k EndpointKey) of(device DeviceKey) probeletEndpointKey {
	return probeletEndpointKey{Hash: k.Hash, Device: device, Port: k.Port, Kind: k.Kind}
}

// packed returns port and kind in the encoding of struct endpoint_list.
func (k EndpointKey) packed() uint32 { return uint32(k.Port)<<16 | uint32(k.Kind) }

// SetReply sets the status to answer with. It returns an error unless that is a 2xx.
func (e *probeletEvidence) SetReply(status int) error {
	if status < statusMin || status > statusMax {
		return fmt.Errorf("status %d: must be between %d and %d", status, statusMin, statusMax)
	}
	e.Status = uint16(status)
	return nil
}

// sealOf computes the seal that binds evidence to its key, like seal_of in bpf/evidence.h.
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

// PortFresh reports whether the kernel may take a connection at its SYN, given the evidence and the tally under the port's PortKey.
// The program is tested against this model.
func PortFresh(port Evidence, tally Tally, now uint64) bool {
	return now < port.FreshUntil && port.ObservedAt > tally.WithdrawnAt
}

// MayAnswer reports whether the kernel may use e to answer its question on a connection taken at takenAt. The tallies are those of
// the port and the endpoint. Like PortFresh, it is a model.
func MayAnswer(e Evidence, port, endpoint Tally, takenAt, now uint64) bool {
	if e.Result != ResultSuccess || e.ObservedAt <= max(port.WithdrawnAt, endpoint.WithdrawnAt) {
		return false
	}
	return now < e.FreshUntil || (takenAt < e.FreshUntil && now-takenAt < takenGrace)
}
