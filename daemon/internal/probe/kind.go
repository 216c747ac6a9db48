package probe

import "slices"

// Kind names the protocol that a probe speaks.
type Kind string

// Kinds.
const (
	HTTP  Kind = "HTTP"
	TCP   Kind = "TCP"
	HTTPS Kind = "HTTPS"
	HTTP2 Kind = "HTTP/2"
	GRPC  Kind = "gRPC"
	Exec  Kind = "exec"
)

// Keying says what identifies an endpoint of a kind, and thus the record that the kernel side keeps of it.
type Keying uint8

// Keyings.
const (
	// NotKeyed: the kernel side keeps no record, so probes of the kind are neither observed nor answered.
	NotKeyed Keying = iota
	// KeyedByPort: all probes of a port ask the same question, and accepting the connection answers them.
	KeyedByPort
	// KeyedByRequest: the bytes of the request distinguish the probes of a port, and the answer is a response.
	KeyedByRequest
)

// kind holds what the rest of the program needs to know about a Kind.
type kind struct {
	name   Kind
	keying Keying
	// success is the event of a probe that got its answer. Whether it succeeded may also depend on the status.
	success Event
	// discarded: the kubelet may discard the outcome of a probe, counting neither a success nor a failure.
	discarded bool
	// never explains why probes of a kind that is not keyed are never answered.
	never string
}

// kinds has a row for each Kind. It is searched for each probe, so the most frequent kinds come first.
var kinds = []kind{
	{name: HTTP, keying: KeyedByRequest, success: Answered, discarded: true},
	{name: TCP, keying: KeyedByPort, success: Connected},
	{name: HTTPS, never: "its requests are encrypted"},
	{name: HTTP2, never: "only HTTP/1.1 is understood"},
	{name: GRPC, never: "only HTTP/1.1 is understood"},
	{name: Exec, never: "it runs inside the container"},
}

// Kinds returns all kinds.
func Kinds() []Kind {
	all := make([]Kind, len(kinds))
	for i := range kinds {
		all[i] = kinds[i].name
	}
	return all
}

// row returns the kind's row, or an empty one for a Kind that is not in the table, such as the empty Kind of an outcome
// whose request was not seen.
func (k Kind) row() kind {
	if i := slices.IndexFunc(kinds, func(row kind) bool { return row.name == k }); i >= 0 {
		return kinds[i]
	}
	return kind{name: k}
}

// Keying returns what identifies the kind's endpoints.
func (k Kind) Keying() Keying { return k.row().keying }

// Observable reports whether the outcomes of the kind's probes can be observed. Only these probes can be answered.
func (k Kind) Observable() bool { return k.Keying() != NotKeyed }

// Discarded reports whether the kubelet may discard the outcome of a probe of the kind.
func (k Kind) Discarded() bool { return k.row().discarded }

// unanswerable returns the reason why probes of the kind are never answered, or the zero Reason if they may be.
func (k Kind) unanswerable() Reason {
	if k.Observable() {
		return Reason{}
	}
	return Reason{ReasonKind, string(k) + " is never answered: " + k.row().never}
}
