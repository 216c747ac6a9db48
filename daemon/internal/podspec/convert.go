package podspec

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Defaults that the API server sets in a probe. Hand-written specs have not been through it.
const (
	defaultPeriodSeconds    = 10
	defaultTimeoutSeconds   = 1
	defaultFailureThreshold = 3
	defaultSuccessThreshold = 1
)

// probes converts the probes of containers, as written in a pod spec.
func probes(containers, initContainers []corev1.Container) ([]probe.Spec, error) {
	specs, err := probesOf("containers", containers)
	sidecars, initErr := sidecars(initContainers)
	return append(specs, sidecars...), errors.Join(err, initErr)
}

// sidecars converts the probes of init containers that keep running, the only ones that may have probes.
func sidecars(initContainers []corev1.Container) ([]probe.Spec, error) {
	for i, c := range initContainers {
		always := c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
		if !always && (c.StartupProbe != nil || c.ReadinessProbe != nil || c.LivenessProbe != nil) {
			return nil, fmt.Errorf("initContainers[%d] (%s): probes need restartPolicy: Always", i, c.Name)
		}
	}
	return probesOf("initContainers", initContainers)
}

func probesOf(field string, containers []corev1.Container) ([]probe.Spec, error) {
	var specs []probe.Spec
	var errs []error
	names := map[string]bool{}
	for i := range containers {
		c := &containers[i]
		at := fmt.Sprintf("%s[%d]", field, i)
		if c.Name == "" || names[c.Name] {
			errs = append(errs, fmt.Errorf("%s.name: %q: must be set and unique", at, c.Name))
		}
		names[c.Name] = true
		for _, p := range []struct {
			probeType probe.Type
			probe     *corev1.Probe
		}{
			{probe.Startup, c.StartupProbe}, {probe.Readiness, c.ReadinessProbe}, {probe.Liveness, c.LivenessProbe},
		} {
			if p.probe == nil {
				continue
			}
			spec, err := convert(c, p.probeType, p.probe)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s (%s): %sProbe.%w", at, c.Name, p.probeType, err))
				continue
			}
			specs = append(specs, spec)
		}
	}
	return specs, errors.Join(errs...)
}

// convert returns what the kubelet sends for a probe. An error names the field and value that the API server would
// reject.
func convert(c *corev1.Container, probeType probe.Type, p *corev1.Probe) (probe.Spec, error) {
	spec := probe.Spec{Container: c.Name, Type: probeType}
	var err error
	if spec.Period, err = seconds("periodSeconds", p.PeriodSeconds, defaultPeriodSeconds); err != nil {
		return spec, err
	}
	if spec.Timeout, err = seconds("timeoutSeconds", p.TimeoutSeconds, defaultTimeoutSeconds); err != nil {
		return spec, err
	}
	if p.FailureThreshold < 0 {
		return spec, fmt.Errorf("failureThreshold: %d: must not be negative", p.FailureThreshold)
	}
	spec.FailureThreshold = int(cmp.Or(p.FailureThreshold, defaultFailureThreshold))
	if p.SuccessThreshold < 0 {
		return spec, fmt.Errorf("successThreshold: %d: must not be negative", p.SuccessThreshold)
	}
	spec.SuccessThreshold = int(cmp.Or(p.SuccessThreshold, defaultSuccessThreshold))
	if n := handlers(p); n != 1 {
		return spec, fmt.Errorf("httpGet, tcpSocket, grpc, exec: %d are set; exactly one must be", n)
	}
	switch {
	case p.HTTPGet != nil:
		err = convertHTTP(&spec, c, p.HTTPGet)
	case p.TCPSocket != nil:
		spec.Kind, spec.Host = probe.TCP, p.TCPSocket.Host
		err = setPort(&spec, c, "tcpSocket.port", p.TCPSocket.Port)
	case p.GRPC != nil:
		spec.Kind = probe.GRPC
		err = setPort(&spec, c, "grpc.port", intstr.FromInt32(p.GRPC.Port))
	default:
		spec.Kind = probe.Exec
	}
	return spec, err
}

func handlers(p *corev1.Probe) int {
	n := 0
	for _, set := range []bool{p.HTTPGet != nil, p.TCPSocket != nil, p.GRPC != nil, p.Exec != nil} {
		if set {
			n++
		}
	}
	return n
}

func seconds(field string, value, byDefault int32) (time.Duration, error) {
	if value < 0 {
		return 0, fmt.Errorf("%s: %d: must not be negative", field, value)
	}
	if value == 0 {
		value = byDefault
	}
	return time.Duration(value) * time.Second, nil
}

func convertHTTP(spec *probe.Spec, c *corev1.Container, get *corev1.HTTPGetAction) error {
	switch {
	case get.Scheme != "" && get.Scheme != corev1.URISchemeHTTP && get.Scheme != corev1.URISchemeHTTPS:
		return fmt.Errorf("httpGet.scheme: %q: must be HTTP or HTTPS", get.Scheme)
	case get.Scheme == corev1.URISchemeHTTPS:
		spec.Kind = probe.HTTPS
	case get.Protocol != nil && *get.Protocol != corev1.HTTPProtocolHTTP1:
		spec.Kind = probe.HTTP2
	default:
		spec.Kind = probe.HTTP
	}
	spec.Host = get.Host
	for _, h := range get.HTTPHeaders {
		spec.Headers = append(spec.Headers, probe.Header{Name: h.Name, Value: h.Value})
	}
	wire, err := wirePath(get.Path)
	if err != nil {
		spec.Problem = err.Error()
	}
	spec.Path = cmp.Or(wire, get.Path)
	return setPort(spec, c, "httpGet.port", get.Port)
}

// wirePath returns the path and query that the kubelet sends (formatURL in its pkg/probe/http/request.go, then net/http):
// a path that is not a URL reference is escaped, and a fragment is dropped. A path with credentials is an error, but its
// path is returned all the same, because other probes may ask for that.
func wirePath(path string) (string, error) {
	const pod = "pod"
	u, err := url.Parse(path)
	if err != nil {
		u = &url.URL{Path: path}
	}
	u.Scheme, u.Host = "http", pod
	sent, err := url.Parse(u.String())
	if err != nil || sent.Host != pod {
		return "", fmt.Errorf("path %q cannot be sent", path)
	}
	wire := sent.RequestURI()
	if sent.User != nil {
		return wire, errors.New("the path contains credentials")
	}
	for i := range len(wire) {
		if wire[i] <= ' ' || wire[i] > '~' {
			return "", fmt.Errorf("path %q would be sent unescaped", path)
		}
	}
	return wire, nil
}

// setPort resolves a port as the kubelet does (ResolveContainerPort in its pkg/probe/util.go).
func setPort(spec *probe.Spec, c *corev1.Container, field string, port intstr.IntOrString) error {
	number := port.IntValue() // for a string: the number in it, or 0
	if port.Type == intstr.String {
		for _, p := range c.Ports {
			if p.Name == port.StrVal {
				number = int(p.ContainerPort)
				break
			}
		}
		if _, err := strconv.Atoi(port.StrVal); err != nil && number == 0 {
			spec.Problem = fmt.Sprintf("port %q is not among the container's ports", port.StrVal)
			return nil
		}
	}
	if number < 1 || number > 65535 {
		return fmt.Errorf("%s: %s: must be between 1 and 65535", field, port.String())
	}
	spec.Port = uint16(number)
	return nil
}

// hooks returns the requests of lifecycle hooks, as the kubelet sends them (runHTTPHandler in its
// pkg/kubelet/lifecycle/handlers.go). It repeats a request over HTTPS without encryption if the server speaks only HTTP.
func hooks(containers, initContainers []corev1.Container) []probe.Spec {
	var specs []probe.Spec
	for _, c := range slices.Concat(containers, initContainers) {
		if c.Lifecycle == nil {
			continue
		}
		for _, h := range []struct {
			hookType probe.Type
			handler  *corev1.LifecycleHandler
		}{{probe.PostStart, c.Lifecycle.PostStart}, {probe.PreStop, c.Lifecycle.PreStop}} {
			if h.handler == nil || h.handler.HTTPGet == nil {
				continue
			}
			spec := probe.Spec{Container: c.Name, Type: h.hookType}
			if err := convertHTTP(&spec, &c, h.handler.HTTPGet); err != nil {
				continue // cannot be sent
			}
			spec.Kind, spec.Headers = probe.HTTP, hookHeaders(spec.Headers)
			specs = append(specs, spec)
		}
	}
	return specs
}

// hookHeaders adds the headers that the kubelet and its HTTP client add.
func hookHeaders(headers []probe.Header) []probe.Header {
	sets := func(name string) bool {
		return slices.ContainsFunc(headers, func(h probe.Header) bool { return strings.EqualFold(h.Name, name) })
	}
	if !sets("Accept-Encoding") && !sets("Range") {
		headers = append(headers, probe.Header{Name: "Accept-Encoding", Value: "gzip"})
	}
	if !sets("User-Agent") {
		headers = append(headers, probe.Header{Name: "User-Agent", Value: "kube-lifecycle/1.37"})
	}
	return headers
}
