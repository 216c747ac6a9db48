// Package statedir manages what the daemon keeps in the state directory for probeletctl and for the next daemon: a lock, held while it
// runs, and a file that describes what is probed.
package statedir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/bpf/lock"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// Endpoints is the content of <state dir>/endpoints.json. It changes with specs and attachments; what is observed is in the kernel's
// maps.
type Endpoints struct {
	// Attachments are in the order of their records.
	Attachments []Attachment `json:"attachments"`
	// Unattached lists pods that have specs but no attachment, as namespace/name.
	Unattached []string `json:"unattached,omitempty"`
}

// Attachment describes an attachment and what its pod is asked.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
	// Pod is namespace/name; empty if the specs have no such pod.
	Pod string `json:"pod,omitempty"`
	// Settings is null if the specs have no such pod.
	Settings  *Settings  `json:"settings,omitempty"`
	Endpoints []Endpoint `json:"endpoints,omitempty"`
}

// Settings has the settings of a pod, and where each comes from: default, node (a flag of the daemon) or annotation.
type Settings struct {
	Mode     probe.Mode   `json:"mode"`
	ModeFrom probe.Origin `json:"modeFrom"`
	// Staleness is in periods, in the format of the annotation; StalenessCeiling is the limit of the node.
	Staleness        probe.StalenessRange `json:"staleness"`
	StalenessFrom    probe.Origin         `json:"stalenessFrom"`
	StalenessCeiling probe.Staleness      `json:"stalenessCeiling"`
	// Refresh says whether, or how often, the daemon asks itself, in the format of the annotation.
	Refresh     probe.Refresh `json:"refresh"`
	RefreshFrom probe.Origin  `json:"refreshFrom"`
	// Liveness says what is evidence for liveness probes, in the format of the annotation.
	Liveness     probe.LivenessEvidence `json:"liveness"`
	LivenessFrom probe.Origin           `json:"livenessFrom"`
	// Problem names an invalid annotation, because of which nothing is answered.
	Problem string `json:"problem,omitempty"`
}

// SettingsOf returns the description of settings.
func SettingsOf(s probe.Settings) *Settings {
	return &Settings{
		Mode: s.Mode, ModeFrom: s.ModeFrom,
		Staleness: s.Staleness, StalenessFrom: s.StalenessFrom, StalenessCeiling: s.Ceiling,
		Refresh: s.Refresh, RefreshFrom: s.RefreshFrom,
		Liveness: s.Liveness, LivenessFrom: s.LivenessFrom,
		Problem: s.Problem,
	}
}

// Probe is a probe that asks an endpoint, with bounds on how long a failure can go unnoticed by it. Times are in seconds.
type Probe struct {
	probe.Asker
	Period           float64 `json:"periodSeconds"`
	Timeout          float64 `json:"timeoutSeconds"`
	FailureThreshold int     `json:"failureThreshold"`
	// Detection is the longest time from the start of a failure to the prober's verdict. DetectionPlain is the same without probelet,
	// DetectionAnswered with the endpoint answered, as it would be in mode answer. DetectionHang is Detection for a pod that no
	// longer serves anyone: smaller where traffic is evidence, and the same elsewhere.
	Detection         float64 `json:"worstDetectionSeconds"`
	DetectionPlain    float64 `json:"worstDetectionPlainSeconds"`
	DetectionAnswered float64 `json:"worstDetectionAnsweredSeconds"`
	DetectionHang     float64 `json:"worstDetectionHangSeconds"`
}

func probesOf(s probe.EndpointSpec) []Probe {
	var probes []Probe
	for _, d := range s.Delays() {
		probes = append(probes, Probe{
			Asker: d.Asker, Period: d.Period.Seconds(), Timeout: d.Timeout.Seconds(),
			FailureThreshold: d.FailureThreshold,
			Detection:        d.Probelet.Seconds(), DetectionPlain: d.Plain.Seconds(), DetectionAnswered: d.Answered.Seconds(),
			DetectionHang: d.Hang.Seconds(),
		})
	}
	return probes
}

// Endpoint is an endpoint that probes ask. Times are in seconds.
type Endpoint struct {
	Kind   probe.Kind `json:"kind"`
	Port   uint16     `json:"port,omitempty"`
	Path   string     `json:"path,omitempty"` // path and query as in the request line
	Host   string     `json:"host,omitempty"` // dialled instead of the pod
	Probes []Probe    `json:"probes"`
	// Period is the shortest period of the probes (ignoring startup probes if there are others), Timeout the smallest timeout, and
	// StalenessBound how long a success is answered.
	Period         float64 `json:"periodSeconds"`
	Timeout        float64 `json:"timeoutSeconds"`
	StalenessBound float64 `json:"stalenessBoundSeconds"`
	// SteadyBound is how long a success is answered once the endpoint is steady; missing if that makes no difference.
	SteadyBound float64 `json:"steadyBoundSeconds,omitempty"`
	// StalenessCapped is set if the node's ceiling lowered the bound.
	StalenessCapped bool `json:"stalenessCapped,omitempty"`
	// HeadersID is a digest of the headers that custom httpHeaders add or change; empty if they do neither.
	HeadersID string `json:"headersID,omitempty"`
	// InstanceID distinguishes the containers of the probes from previous and later ones; empty if it is unknown.
	InstanceID string `json:"instanceID,omitempty"`
	// Live is the most TCP probes in a row that are answered by inspecting the pod's listening socket; 0 for HTTP, or if the kernel
	// does not support that.
	Live int `json:"live,omitempty"`
	// Successes is how many probes in a row must succeed before the next is answered, after a failure or if nothing is known.
	Successes int `json:"successesNeeded"`
	// Refresh is how often the daemon asks itself while the endpoint succeeds; 0: never. RefreshOff is the reason if the settings
	// request it nevertheless.
	Refresh    float64 `json:"refreshSeconds,omitempty"`
	RefreshOff string  `json:"refreshOff,omitempty"`
	// Traffic is the most probes in a row that are answered because the pod serves its clients; 0 if its traffic is no evidence.
	// TrafficOff is the reason if the settings request it nevertheless. TrafficBound is how long after a real probe such answers end,
	// and TrafficWindow how recently the pod must have served.
	Traffic       int     `json:"traffic,omitempty"`
	TrafficOff    string  `json:"trafficOff,omitempty"`
	TrafficBound  float64 `json:"trafficBoundSeconds,omitempty"`
	TrafficWindow float64 `json:"trafficWindowSeconds,omitempty"`
	// Observed is set if the probes are observed.
	Observed bool `json:"observed"`
	// StartupOnly is set if only startup probes ask the endpoint. A TCP endpoint like that does not keep its port from being answered.
	StartupOnly bool `json:"startupOnly,omitempty"`
	// NotAnswered is why the endpoint is never answered, and NotAnsweredCode the code of that reason; both are empty if it may be
	// answered. Withheld is set if mode observe is the only reason.
	NotAnswered     string           `json:"notAnswered,omitempty"`
	NotAnsweredCode probe.ReasonCode `json:"notAnsweredCode,omitempty"`
	Withheld        bool             `json:"withheld,omitempty"`
	// Question identifies the request that last asked the endpoint, as in the kernel's maps; zero if it is unknown.
	Question probe.Question `json:"question,omitzero"`
	// Disagreement is how the kubelet's verdict on the probes differed from what was observed, failed or discarded, since when the
	// endpoint is not answered; empty if it never did.
	Disagreement string `json:"disagreement,omitempty"`
	// NotCompared is why the kubelet's verdict is not compared with what was observed: something else may ask the same. It is empty if
	// it is compared, provided that the daemon can read it.
	NotCompared string `json:"notCompared,omitempty"`
}

// EndpointOf returns the description of an endpoint, and of the question that it was asked, which is zero if it is unknown.
func EndpointOf(s probe.EndpointSpec, question probe.Question) Endpoint {
	steady := s.SteadyStaleness.Seconds()
	if s.SteadyStaleness == s.Staleness {
		steady = 0
	}
	return Endpoint{
		Kind: s.Kind, Port: s.Port, Path: s.Path, Host: s.Host,
		Probes:         probesOf(s),
		Period:         s.Period.Seconds(),
		Timeout:        s.Timeout.Seconds(),
		StalenessBound: s.Staleness.Seconds(),
		SteadyBound:    steady,
		Traffic:        s.Traffic,
		TrafficOff:     s.TrafficOff,
		TrafficBound:   s.TrafficBound().Seconds(),
		TrafficWindow:  s.TrafficWindow().Seconds(),

		StalenessCapped: s.Capped,
		HeadersID:       s.Headers,
		Live:            s.Live,
		Successes:       s.SuccessThreshold,
		InstanceID:      s.Instance,
		Refresh:         s.Refresh.Seconds(),
		RefreshOff:      s.RefreshOff,
		Observed:        s.Observed,
		StartupOnly:     s.Startup,
		NotAnswered:     s.Reason.Text,
		NotAnsweredCode: s.Reason.Code,
		Withheld:        s.Withheld,
		Question:        question,
	}
}

// Endpoint returns the endpoint that is described.
func (e Endpoint) Endpoint() probe.Endpoint {
	return probe.Endpoint{Port: e.Port, Kind: e.Kind, Path: e.Path, Host: e.Host, Headers: e.HeadersID}
}

// SocketPath returns the socket that the daemon listens on (package api).
func SocketPath(stateDir string) string { return filepath.Join(stateDir, "probeletd.sock") }

// MetricsSocketPath returns the socket that the daemon serves monitoring on.
func MetricsSocketPath(stateDir string) string {
	return filepath.Join(stateDir, "metrics", "metrics.sock")
}

func endpointsPath(stateDir string) string { return filepath.Join(stateDir, "endpoints.json") }

// WriteEndpoints replaces the file atomically.
func WriteEndpoints(stateDir string, e Endpoints) error {
	text, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return err
	}
	err = renameio.WriteFile(endpointsPath(stateDir), append(text, '\n'), 0o600, renameio.WithTempDir(stateDir))
	var at *os.PathError
	if errors.As(err, &at) { // the name of the temporary file differs each time
		err = &os.PathError{Op: "write", Path: endpointsPath(stateDir), Err: at.Err}
	}
	return err
}

// ReadEndpoints reads the file. The error is os.ErrNotExist if no daemon has ever written it.
func ReadEndpoints(stateDir string) (Endpoints, error) {
	var e Endpoints
	text, err := os.ReadFile(endpointsPath(stateDir))
	if err != nil {
		return e, err
	}
	if err := json.Unmarshal(text, &e); err != nil {
		return e, fmt.Errorf("%s: %w", endpointsPath(stateDir), err)
	}
	return e, nil
}

var (
	// ErrRunning means that another daemon holds the state directory, or the pins.
	ErrRunning = errors.New("another probeletd is running")
	// ErrRemoved means that the state directory was removed or replaced, so that another daemon can hold the current one.
	ErrRemoved = errors.New("the state directory was removed")
)

// Held is a state directory that this process holds.
type Held struct{ file *os.File }

func lockPath(stateDir string) string { return filepath.Join(stateDir, "probeletd.lock") }

// wholeFile describes a lock owned by an open file instead of a process: the kernel releases it with the last descriptor, and it can be
// queried without being taken.
func wholeFile() *unix.Flock_t { return &unix.Flock_t{Type: unix.F_WRLCK} }

// Lock takes the state directory for this process, until Release or its exit, and removes what others left unfinished. The error is
// ErrRunning if another daemon holds it.
func Lock(stateDir string) (*Held, error) {
	f, err := os.OpenFile(lockPath(stateDir), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, wholeFile()); err != nil {
		pid, _ := readPID(f)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			err = fmt.Errorf("%w, pid %d", ErrRunning, pid)
		}
		return nil, errors.Join(fmt.Errorf("locking %s: %w", f.Name(), err), f.Close())
	}
	if now, err := os.Stat(f.Name()); err != nil || !isFile(f, now) {
		// The previous holder has removed the file meanwhile (Remove), so this lock excludes nobody.
		return nil, errors.Join(fmt.Errorf("locking %s: it has just been removed; try again", f.Name()), f.Close())
	}
	if err := removeUnfinished(stateDir); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	_ = writePID(f) // only informative; the disk may be full
	return &Held{f}, nil
}

// Release releases the state directory.
func (h *Held) Release() error { return h.file.Close() }

// Check returns ErrRemoved if the lock no longer protects the state directory.
func (h *Held) Check() error {
	if now, err := os.Stat(h.file.Name()); err == nil && isFile(h.file, now) {
		return nil
	}
	return fmt.Errorf("%s: %w", filepath.Dir(h.file.Name()), ErrRemoved)
}

// removeUnfinished removes what is left if writing the file of endpoints or making the socket was interrupted.
func removeUnfinished(stateDir string) error {
	var errs []error
	for _, pattern := range []string{listening + "[0-9]*", ".endpoints.json[0-9]*"} {
		left, err := filepath.Glob(filepath.Join(stateDir, pattern))
		errs = append(errs, err)
		for _, path := range left {
			errs = append(errs, os.RemoveAll(path))
		}
	}
	return errors.Join(errs...)
}

func isFile(f *os.File, info os.FileInfo) bool {
	own, err := f.Stat()
	return err == nil && os.SameFile(own, info)
}

// Running reports whether a daemon holds the state directory, and its PID, which is 0 if the daemon could not write it.
func Running(stateDir string) (pid int, running bool, err error) {
	f, err := os.Open(lockPath(stateDir))
	if errors.Is(err, os.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	defer f.Close() //nolint:errcheck // read only
	held := wholeFile()
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, held); err != nil {
		return 0, false, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if held.Type == unix.F_UNLCK {
		return 0, false, nil
	}
	pid, err = readPID(f)
	return pid, true, err
}

func writePID(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

func readPID(f *os.File) (int, error) {
	text := make([]byte, 32)
	n, err := f.ReadAt(text, 0)
	if n == 0 && errors.Is(err, io.EOF) {
		return 0, nil
	}
	if n == 0 {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text[:n])))
}

func chainLockPath(stateDir string) string { return filepath.Join(stateDir, "chain.lock") }

// LockChain keeps other processes from changing the chain or the plugin's binary until it is released. The error is lock.ErrHeld if ctx
// ends before.
func LockChain(ctx context.Context, stateDir string) (*lock.Lock, error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, err
	}
	return lock.File(ctx, chainLockPath(stateDir), unix.LOCK_EX)
}

// Remove removes the daemon's files, including those that a killed daemon left unfinished, and the directory if it is empty then. It must
// be called under Lock.
func Remove(stateDir string) error {
	if err := removeUnfinished(stateDir); err != nil {
		return err
	}
	metrics := MetricsSocketPath(stateDir)
	for _, file := range []string{
		endpointsPath(stateDir), SocketPath(stateDir), lockPath(stateDir), chainLockPath(stateDir), metrics, filepath.Dir(metrics),
	} {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	err := os.Remove(stateDir)
	// Other files stay, and so does the directory then. In a pod, it is a mount in a read-only root.
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}

// listening is the prefix of the temporary directory in which the daemon makes its socket.
const listening = "api"

// ListeningDir creates a directory for a socket that will be renamed to SocketPath.
func ListeningDir(stateDir string) (string, error) { return os.MkdirTemp(stateDir, listening) }

// ClaimPins takes the BPF objects pinned below bpfDir for this process, until release. The error is ErrRunning if another daemon holds
// them, with whatever state directory.
func ClaimPins(bpfDir string) (release func(), err error) {
	release, err = datapath.Claim(bpfDir)
	if errors.Is(err, datapath.ErrLocked) {
		err = fmt.Errorf("%w, with another state directory: %w", ErrRunning, err)
	}
	return release, err
}
