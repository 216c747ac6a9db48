// Package statedir is what the daemon leaves in the state directory for probeletctl, and for itself after a restart: a
// lock that says that it runs, and a file that says what it does.
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

// Endpoints is the contents of <state dir>/endpoints.json. It changes with specs and attachments; what is observed is in
// the kernel's maps.
type Endpoints struct {
	// Attachments are those that the daemon knows, in the order of their records.
	Attachments []Attachment `json:"attachments"`
	// Unattached are pods with specs and without an attachment, as namespace/name.
	Unattached []string `json:"unattached,omitempty"`
}

// Attachment is one attachment, with what the pod behind it is asked.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
	// Pod is the pod that the specs say it is, as namespace/name; empty if none.
	Pod string `json:"pod,omitempty"`
	// Settings are the pod's; null if the specs say nothing of it.
	Settings  *Settings  `json:"settings,omitempty"`
	Endpoints []Endpoint `json:"endpoints,omitempty"`
}

// Settings are what holds for a pod, and who said so: default, node (a flag of the daemon) or annotation.
type Settings struct {
	Mode     probe.Mode   `json:"mode"`
	ModeFrom probe.Origin `json:"modeFrom"`
	// Staleness is in periods, as it is written in the annotation; StalenessCeiling is the node's.
	Staleness        probe.Staleness `json:"staleness"`
	StalenessFrom    probe.Origin    `json:"stalenessFrom"`
	StalenessCeiling probe.Staleness `json:"stalenessCeiling"`
	// Refresh is whether the daemon asks by itself, or how often, as it is written in the annotation.
	Refresh     probe.Refresh `json:"refresh"`
	RefreshFrom probe.Origin  `json:"refreshFrom"`
	// Problem says which annotation cannot be used, and why; nothing is answered then.
	Problem string `json:"problem,omitempty"`
}

// SettingsOf describes settings.
func SettingsOf(s probe.Settings) *Settings {
	return &Settings{
		Mode: s.Mode, ModeFrom: s.ModeFrom,
		Staleness: s.Staleness, StalenessFrom: s.StalenessFrom, StalenessCeiling: s.Ceiling,
		Refresh: s.Refresh, RefreshFrom: s.RefreshFrom,
		Problem: s.Problem,
	}
}

// Probe is a probe that asks an endpoint, and the bound on how long a failure can go unnoticed by it. Times are in
// seconds.
type Probe struct {
	probe.Asker
	Period           float64 `json:"periodSeconds"`
	Timeout          float64 `json:"timeoutSeconds"`
	FailureThreshold int     `json:"failureThreshold"`
	// Detection is the longest time from the beginning of a failure to the prober's verdict, DetectionPlain what it would
	// be without probelet, and DetectionAnswered what it is if the endpoint is answered, or in mode observe would be.
	Detection         float64 `json:"worstDetectionSeconds"`
	DetectionPlain    float64 `json:"worstDetectionPlainSeconds"`
	DetectionAnswered float64 `json:"worstDetectionAnsweredSeconds"`
}

func probesOf(s probe.EndpointSpec) []Probe {
	var probes []Probe
	for _, d := range s.Delays() {
		probes = append(probes, Probe{
			Asker: d.Asker, Period: d.Period.Seconds(), Timeout: d.Timeout.Seconds(),
			FailureThreshold: d.FailureThreshold,
			Detection:        d.Probelet.Seconds(), DetectionPlain: d.Plain.Seconds(), DetectionAnswered: d.Answered.Seconds(),
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
	// Period is the shortest of the probes (of startup probes only if there are no others), Timeout the smallest, and
	// StalenessBound how long a success is answered.
	Period         float64 `json:"periodSeconds"`
	Timeout        float64 `json:"timeoutSeconds"`
	StalenessBound float64 `json:"stalenessBoundSeconds"`
	// StalenessCapped: the node's ceiling lowered the bound.
	StalenessCapped bool `json:"stalenessCapped,omitempty"`
	// HeadersID is a digest of the headers that a probe without custom ones does not have, empty if there are none.
	HeadersID string `json:"headersID,omitempty"`
	// InstanceID tells the containers of the probes from those before and after them; empty if they are not known.
	InstanceID string `json:"instanceID,omitempty"`
	// Live is how many TCP probes in a row are answered at most on a look at the pod's listening socket; 0: HTTP, or this
	// kernel does not allow such a look.
	Live int `json:"live,omitempty"`
	// Successes is how many probes in a row must succeed before one is answered, after a failure or if nothing is known.
	Successes int `json:"successesNeeded"`
	// Refresh is how often the daemon asks by itself while the endpoint succeeds; 0: never. RefreshOff is why not, where the
	// settings want it.
	Refresh    float64 `json:"refreshSeconds,omitempty"`
	RefreshOff string  `json:"refreshOff,omitempty"`
	// Observed: its probes are observed.
	Observed bool `json:"observed"`
	// StartupOnly: only startup probes ask it. If it is TCP, it does not keep its port from being answered.
	StartupOnly bool `json:"startupOnly,omitempty"`
	// NotAnswered is why it is never answered, and NotAnsweredCode the code of that reason; empty if it may be. Withheld: only
	// because of mode observe.
	NotAnswered     string           `json:"notAnswered,omitempty"`
	NotAnsweredCode probe.ReasonCode `json:"notAnsweredCode,omitempty"`
	Withheld        bool             `json:"withheld,omitempty"`
	// Question is the one by which it was asked last, as the kernel's maps name it; zero if that is not known.
	Question probe.Question `json:"question,omitzero"`
	// Disagreement is how the kubelet's own verdict on its probes differed from what was observed, since when it is not
	// answered: failed or discarded; empty: it did not.
	Disagreement string `json:"disagreement,omitempty"`
	// NotCompared is why the kubelet's verdict on its probes is not compared with what was observed: somebody else may ask the
	// same. Empty: it is, where the daemon can have it.
	NotCompared string `json:"notCompared,omitempty"`
}

// EndpointOf describes an endpoint with the question that it is asked, which is zero if that is not known.
func EndpointOf(s probe.EndpointSpec, question probe.Question) Endpoint {
	return Endpoint{
		Kind: s.Kind, Port: s.Port, Path: s.Path, Host: s.Host,
		Probes:         probesOf(s),
		Period:         s.Period.Seconds(),
		Timeout:        s.Timeout.Seconds(),
		StalenessBound: s.Staleness.Seconds(),

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

// Endpoint is what is asked.
func (e Endpoint) Endpoint() probe.Endpoint {
	return probe.Endpoint{Port: e.Port, Kind: e.Kind, Path: e.Path, Host: e.Host, Headers: e.HeadersID}
}

// SocketPath is where the daemon listens (package api).
func SocketPath(stateDir string) string { return filepath.Join(stateDir, "probeletd.sock") }

// MetricsSocketPath is where the daemon listens for what monitoring asks.
func MetricsSocketPath(stateDir string) string {
	return filepath.Join(stateDir, "metrics", "metrics.sock")
}

func endpointsPath(stateDir string) string { return filepath.Join(stateDir, "endpoints.json") }

// WriteEndpoints replaces the file; a reader sees the old or the new one.
func WriteEndpoints(stateDir string, e Endpoints) error {
	text, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return err
	}
	err = renameio.WriteFile(endpointsPath(stateDir), append(text, '\n'), 0o600, renameio.WithTempDir(stateDir))
	var at *os.PathError
	if errors.As(err, &at) { // that of the temporary file is another one each time
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
	// ErrRunning: another daemon has the state directory.
	ErrRunning = errors.New("another probeletd is running")
	// ErrRemoved: the state directory was removed or replaced, so another daemon can have the one that there is now.
	ErrRemoved = errors.New("the state directory was removed")
)

// Held is a state directory that this process has.
type Held struct{ file *os.File }

func lockPath(stateDir string) string { return filepath.Join(stateDir, "probeletd.lock") }

// wholeFile is a lock of an open file, as opposed to a process: the kernel releases it with the last descriptor, and it
// can be asked for without being taken.
func wholeFile() *unix.Flock_t { return &unix.Flock_t{Type: unix.F_WRLCK} }

// Lock takes the state directory for this process, until Release or its end, and removes what others left unfinished. The error
// is ErrRunning if another daemon has it.
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
		// Whoever had the lock has removed the file meanwhile (Remove): it is nobody's any more.
		return nil, errors.Join(fmt.Errorf("locking %s: it was removed just now; try again", f.Name()), f.Close())
	}
	if err := removeUnfinished(stateDir); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	_ = writePID(f) // for people only; there may be no room for it
	return &Held{f}, nil
}

// Release ends what Lock began.
func (h *Held) Release() error { return h.file.Close() }

// Check returns ErrRemoved if others do not see any more that this process has the state directory.
func (h *Held) Check() error {
	if now, err := os.Stat(h.file.Name()); err == nil && isFile(h.file, now) {
		return nil
	}
	return fmt.Errorf("%s: %w", filepath.Dir(h.file.Name()), ErrRemoved)
}

// removeUnfinished removes what writing the file of endpoints and making the socket left, if they were interrupted.
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

// Running says whether a daemon has the state directory, and its pid; 0 if it could not write that.
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

// LockChain keeps other processes from changing the chain or the plugin's binary, until it is released. The error is
// lock.ErrHeld when ctx ends before.
func LockChain(ctx context.Context, stateDir string) (*lock.Lock, error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, err
	}
	return lock.File(ctx, chainLockPath(stateDir), unix.LOCK_EX)
}

// Remove removes the daemon's files, those that a killed one left half-written included, and the directory if nothing else is
// in it. To be called under Lock.
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
	// Others' files stay, and so does the directory; in a pod it is a mount, in a root that is read-only.
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}

// listening begins the name of the directory in which the daemon makes its socket.
const listening = "api"

// ListeningDir makes a directory for a socket that is to be renamed to SocketPath.
func ListeningDir(stateDir string) (string, error) { return os.MkdirTemp(stateDir, listening) }

// ClaimPins claims the objects that are pinned under bpfDir for this process, until release. The error is ErrRunning if another
// daemon has them, whatever its state directory.
func ClaimPins(bpfDir string) (release func(), err error) {
	release, err = datapath.Claim(bpfDir)
	if errors.Is(err, datapath.ErrLocked) {
		err = fmt.Errorf("%w, with another state directory: %w", ErrRunning, err)
	}
	return release, err
}
