package probe

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Endpoint identifies what a probe asks. Probes of the same endpoint share what was observed of it.
type Endpoint struct {
	Port    uint16
	Kind    Kind
	Path    string // as in the request line; HTTP only
	Host    string // host dialled instead of the pod, as spelled in the spec; empty for the pod
	Headers string // digest of the headers that differ from those of a probe without custom headers; empty if none do
}

func (e Endpoint) String() string {
	text := string(e.Kind)
	if e.Port != 0 {
		text += fmt.Sprintf(" :%d%s", e.Port, e.Path)
	}
	if e.Host != "" {
		text += " at " + e.Host
	}
	if e.Headers != "" {
		text += " with headers " + e.Headers[:4]
	}
	return text
}

// Limits describes what the kernel side supports.
type Limits struct {
	Request int // longest request, in bytes
	Records int // records per pod: one for each of its endpoints and ports
	// Live limits how many TCP probes in a row are answered because the pod's listening socket would accept them; 0 if
	// the kernel side cannot inspect listening sockets.
	Live int
	// Traffic limits how many probes in a row are answered because the pod serves its clients.
	Traffic int
}

// EndpointSpec says which probes ask an endpoint, and how observations of it may be used.
type EndpointSpec struct {
	Endpoint
	Askers []Asker
	// Period is the shortest period of the askers; startup probes count only if there are no others. Timeout is the
	// smallest timeout of all askers, because a response that exceeds a probe's own timeout is not a success of that
	// probe.
	Period, Timeout time.Duration
	// Staleness limits how long after its observation a success may be answered, and SteadyStaleness does so once the
	// endpoint has succeeded for SteadyAfter. Capped: the node's ceiling lowered them.
	Staleness, SteadyStaleness time.Duration
	Capped                     bool
	// Live is Limits.Live for a TCP endpoint, otherwise 0. With 0 a success is answered like an HTTP endpoint's.
	Live int
	// SuccessThreshold is the number of successes in a row that arm the endpoint after a failure, or when nothing is
	// known of it.
	SuccessThreshold int
	// Instance identifies the running containers of the askers. Evidence of other instances is void.
	Instance string
	// Refresh is the interval at which the daemon sends its own request, to keep a success fresh; 0 means never. If the
	// settings ask for refresh all the same, RefreshOff explains why there is none.
	Refresh    time.Duration
	RefreshOff string
	// Traffic is Limits.Traffic if the pod's traffic may vouch for the endpoint, otherwise 0. If the settings ask for that all
	// the same, TrafficOff explains why it may not; empty for endpoints that no liveness probe asks.
	Traffic    int
	TrafficOff string
	// Observed: the outcomes of its probes are recorded, whether or not they are answered.
	Observed bool
	// Startup: only startup probes ask it. They end with their success, so their evidence is never renewed.
	Startup bool
	// Reason explains why the endpoint is never answered; zero if it may be. Withheld: only mode observe prevents it.
	Reason   Reason
	Withheld bool
	// elsewhere: the host dialled is certainly not the pod.
	elsewhere bool

	probes   []Spec   // parallel to Askers
	question question // HTTP only
}

// onPort reports whether connections of the endpoint's probes may arrive at the pod's port.
func (s EndpointSpec) onPort() bool { return s.Port != 0 && !s.elsewhere }

// answeredWith reports whether the kernel, if it may answer e, would also answer the probes of this endpoint, which dial
// another address of the pod: taking a connection answers a TCP probe, and only the Host header of a request says which
// address it was sent to.
func (s EndpointSpec) answeredWith(e EndpointSpec) bool {
	return s.onPort() && s.Port == e.Port && (s.Kind.Keying() == KeyedByPort || s.Kind == e.Kind && e.Asks(s.question.Request))
}

// Endpoints returns the endpoints that the pod's probes ask, sorted. It returns an error if the pod has too many for the
// kernel side; then none is answered, and the specs say so too.
func Endpoints(pod Pod, settings Settings, limits Limits) ([]EndpointSpec, error) {
	var specs []EndpointSpec
	shared := map[Endpoint]int{}
	for _, p := range pod.Probes {
		one := endpointOf(p, pod.IPs, limits)
		if i, ok := shared[one.Endpoint]; ok && one.Observed {
			specs[i] = merge(specs[i], one)
			continue
		}
		if one.Observed {
			shared[one.Endpoint] = len(specs)
		}
		specs = append(specs, one)
	}
	for i := range specs {
		if specs[i].Startup && specs[i].Reason == (Reason{}) {
			specs[i].Reason = Reason{ReasonStartup, "only startup probes ask it"}
		}
		if pod.NotAnswered != "" {
			specs[i].Reason = cmp.Or(specs[i].Reason, Reason{ReasonPod, pod.NotAnswered})
		}
		specs[i].Period = shortestPeriod(specs[i].probes)
		specs[i].SuccessThreshold = successesNeeded(specs[i].probes)
	}
	slices.SortStableFunc(specs, compare)
	closeBeside(specs)
	settings.apply(specs)
	err := limit(specs, limits.Records)
	for i := range specs {
		specs[i].setRefresh(settings, len(pod.IPs) > 0)
		specs[i].setTraffic(settings, limits)
	}
	deferToDecider(specs)
	return specs, err
}

// setRefresh decides whether the daemon sends requests of its own.
func (s *EndpointSpec) setRefresh(settings Settings, addressed bool) {
	switch {
	case !settings.Refresh.On:
	case s.Reason != (Reason{}):
		s.RefreshOff = reasonNotAnswered
	case settings.RefreshDenied:
		s.RefreshOff = "the node does not allow pods to request it (--refresh-by-annotation)"
	case !addressed:
		s.RefreshOff = "the specs do not give the pod's address"
	case s.Live > 0:
		s.RefreshOff = "the kernel checks the listening socket itself"
	default:
		s.Refresh = settings.Refresh.Of(s.Staleness - slack(s.Period, s.Timeout))
	}
}

// Bar sets the reason not to answer specs[i], overriding any other, such as mode observe. If that endpoint decides for its port, traffic no
// longer vouches for the port's other endpoints.
func Bar(specs []EndpointSpec, i int, reason Reason) {
	s := &specs[i]
	s.Reason, s.Withheld = reason, false
	if s.Traffic > 0 {
		s.Traffic, s.TrafficOff = 0, reasonNotAnswered
	}
	if s.Refresh > 0 {
		s.Refresh, s.RefreshOff = 0, reasonNotAnswered
	}
	deferToDecider(specs)
}

const reasonNotAnswered = "it is not answered"

func compare(a, b EndpointSpec) int {
	return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Path, b.Path),
		cmp.Compare(a.Host, b.Host), cmp.Compare(a.Headers, b.Headers))
}

// endpointOf returns the endpoint of a single probe.
func endpointOf(p Spec, ips []netip.Addr, limits Limits) EndpointSpec {
	s := EndpointSpec{
		Endpoint: Endpoint{Port: p.Port, Kind: p.Kind, Path: p.Path, Host: p.Host},
		Askers:   []Asker{p.Asker()},
		probes:   []Spec{p},
		Timeout:  p.Timeout,
		Instance: p.instanceID(),
		Startup:  p.Type == Startup,

		elsewhere: elsewhere(p.Host, ips),
	}
	if p.Kind.Keying() == KeyedByRequest && p.Problem == "" {
		var err error
		if s.question, err = questionOf(p, ips); err != nil {
			p.Problem = "the request cannot be sent: " + err.Error()
		}
		s.Headers = s.question.headers
	}
	s.Reason = s.unanswerable(p, len(ips), limits)
	s.Observed = p.Problem == "" && p.Host == "" && s.Port != 0 && p.Kind.Observable()
	if p.Kind.Keying() == KeyedByPort {
		s.Live = limits.Live
	}
	return s
}

// elsewhere reports whether host is certainly not the pod. The pod's other addresses are the pod too, although its probes
// do not dial them. A name may resolve to anything.
func elsewhere(host string, ips []netip.Addr) bool {
	_, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && !dials(host, ips)
}

// unanswerable returns the reason why a probe can never be answered, regardless of the pod's other probes, or the zero
// Reason.
func (s EndpointSpec) unanswerable(p Spec, addresses int, limits Limits) Reason {
	switch {
	case p.Problem != "":
		return Reason{ReasonRequest, p.Problem}
	case !p.Kind.Observable():
		return p.Kind.unanswerable()
	case p.Host != "":
		return Reason{ReasonHost, fmt.Sprintf("host %q is probed, not the pod", p.Host)}
	case addresses != 1 && s.question.setsHost: // probes of other pods may ask another address the same question
		return Reason{ReasonHost, "its Host header does not say which of the pod's addresses it asks"}
	case s.question.size > limits.Request:
		return Reason{ReasonTooLong, fmt.Sprintf("the request has about %d bytes; at most %d can be answered", s.question.size, limits.Request)}
	}
	return Reason{}
}

// successesNeeded returns how many successes in a row prove that each of the probes has had as many as its own
// successThreshold. Since it is unknown which of the probes sent a request, it adds as many as all the others may have
// completed meanwhile. A startup probe ends with its first success, until the container is replaced.
func successesNeeded(probes []Spec) int {
	most := 1
	for i, p := range probes {
		if p.SuccessThreshold <= 1 {
			continue
		}
		needed := p.SuccessThreshold
		meanwhile := sum(times(p.SuccessThreshold, max(p.Period, p.Timeout)), p.Timeout)
		for j, other := range probes {
			switch {
			case j == i:
			case other.Type == Startup:
				needed++
			default:
				needed += 1 + int(sum(meanwhile, other.Timeout)/other.Period)
			}
		}
		most = max(most, needed)
	}
	return most
}

// shortestPeriod returns the shortest period of the probes that go on for as long as their container runs. It falls back
// to startup probes, which have ended by the time that their success could be answered to them.
func shortestPeriod(probes []Spec) time.Duration {
	var all, lasting []time.Duration
	for _, p := range probes {
		if all = append(all, p.Period); p.Type != Startup {
			lasting = append(lasting, p.Period)
		}
	}
	if len(lasting) == 0 {
		return slices.Min(all)
	}
	return slices.Min(lasting)
}

// longestTimeout returns the longest timeout of all askers.
func (s EndpointSpec) longestTimeout() (longest time.Duration) {
	for _, p := range s.probes {
		longest = max(longest, p.Timeout)
	}
	return longest
}

// merge merges two specs of the same endpoint.
func merge(a, b EndpointSpec) EndpointSpec {
	a.Askers = append(a.Askers, b.Askers...)
	a.probes = append(a.probes, b.probes...)
	a.Timeout = min(a.Timeout, b.Timeout)
	a.Startup = a.Startup && b.Startup
	if !strings.Contains(a.Instance, b.Instance) {
		a.Instance += " " + b.Instance
	}
	a.Reason = cmp.Or(a.Reason, b.Reason)
	return a
}

// closeBeside sets a reason on endpoints that cannot be answered without also answering one that is not observed.
func closeBeside(specs []EndpointSpec) {
	for _, never := range specs {
		if never.Observed {
			continue
		}
		for i, s := range specs {
			if s.Reason == (Reason{}) && never.answeredWith(s) {
				specs[i].Reason = Reason{ReasonBeside, fmt.Sprintf("answering it would also answer %s of %s, which is never answered: %s",
					never.Endpoint, never.Askers[0], never.Reason.Text)}
			}
		}
	}
}

// limit closes all endpoints if the pod needs more records than it has room for.
func limit(specs []EndpointSpec, records int) error {
	endpoints, ports := 0, map[uint16]bool{}
	for _, s := range specs {
		if s.Observed {
			endpoints++
			ports[s.Port] = true
		}
	}
	if endpoints+len(ports) <= records {
		return nil
	}
	err := fmt.Errorf("%d endpoints on %d ports need %d records; a pod has room for %d",
		endpoints, len(ports), endpoints+len(ports), records)
	for i := range specs {
		if specs[i].Reason == (Reason{}) || specs[i].Withheld {
			specs[i].Reason = Reason{ReasonRoom, err.Error()}
		}
		specs[i].Observed, specs[i].Withheld = false, false
	}
	return err
}
