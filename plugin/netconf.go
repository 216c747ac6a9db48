package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

const (
	// onErrorIgnore starts the pod without probelet and gives the reason on stderr and in the record.
	onErrorIgnore = "ignore"
	onErrorFail   = "fail"

	// maxPath, in bytes, leaves room within PATH_MAX (4,096) for paths below a configured directory.
	maxPath = 2048
)

// netConf is the plugin's part of a network configuration.
type netConf struct {
	name string

	hook     attach.Hook
	onError  string
	bpfDir   string
	stateDir string
	logFile  string // empty: none

	prevResult *current.Result // nil: none
	// rawPrevResult is printed instead of prevResult so that fields unknown to this build pass through unchanged.
	rawPrevResult json.RawMessage
	// validAttachments lists the attachments that GC must keep; nil if not given.
	validAttachments []types.GCAttachment
}

const fieldValidAttachments = "cni.dev/valid-attachments"

func defaultConf() *netConf {
	return &netConf{hook: attach.HookTC, onError: onErrorIgnore, bpfDir: datapath.DefaultDir, stateDir: attach.DefaultStateDir}
}

// ownFields maps probelet's own fields, all of them strings, to their setters. A setter that returns an error changes nothing.
var ownFields = map[string]func(c *netConf, value string) error{
	"hook":     setHook,
	"onError":  setOnError,
	"bpfDir":   setBPFDir,
	"stateDir": setStateDir,
	"logFile":  func(c *netConf, value string) error { return setPath(&c.logFile, value) },
}

// replacedFields maps removed fields to their successors.
var replacedFields = map[string]string{"xdpMode": "hook"}

// specFields are defined by the CNI specification or libcni, either for a plugin or for the enclosing list, whose fields some
// runtimes copy down. Everything in the cni.dev/ namespace is the specification's as well.
var specFields = []string{
	"cniVersion", "cniVersions", "name", "type", "capabilities", "ipam", "dns", "args", "ipMasq", "disableCheck",
	"disableGC", "loadOnlyInlinedPlugins", "runtimeConfig", "prevResult",
}

func setHook(c *netConf, value string) error {
	hook, err := attach.ParseHook(value)
	if err == nil {
		c.hook = hook
	}
	return err
}

func setOnError(c *netConf, value string) error {
	if value != onErrorIgnore && value != onErrorFail {
		return fmt.Errorf("must be %q or %q", onErrorIgnore, onErrorFail)
	}
	c.onError = value
	return nil
}

// setPath rejects paths that cannot exist, so that DEL falls back to the default instead of failing.
func setPath(path *string, value string) error {
	if !filepath.IsAbs(value) {
		return errors.New("must be an absolute path")
	}
	if len(value) > maxPath {
		return fmt.Errorf("must not be longer than %d bytes", maxPath)
	}
	if _, err := os.Stat(value); errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENAMETOOLONG) || errors.Is(err, unix.ELOOP) {
		return err
	}
	*path = filepath.Clean(value)
	return nil
}

func setBPFDir(c *netConf, value string) error {
	var dir string
	if err := setPath(&dir, value); err != nil {
		return err
	}
	if err := datapath.CheckDir(dir); err != nil {
		return err
	}
	c.bpfDir = dir
	return nil
}

func setStateDir(c *netConf, value string) error {
	var dir string
	if err := setPath(&dir, value); err != nil {
		return err
	}
	if onBPFFS(dir) {
		return errors.New("must not be on a BPF file system, which holds no regular files")
	}
	c.stateDir = dir
	return nil
}

// onBPFFS reports whether a path is on a BPF file system, or would be if it were created.
func onBPFFS(path string) bool {
	var fs unix.Statfs_t
	err := unix.Statfs(path, &fs)
	if err != nil && path != "/" {
		return onBPFFS(filepath.Dir(path))
	}
	return err == nil && fs.Type == unix.BPF_FS_MAGIC
}

// parseConf parses a configuration strictly. Its errors name the field and the value.
func parseConf(stdin []byte) (*netConf, error) {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(stdin, &raw); err != nil {
		return nil, fault(types.ErrDecodingFailure, "the network configuration is not a JSON object: %v", err)
	}
	conf := defaultConf()
	for _, name := range slices.Sorted(maps.Keys(raw)) {
		if err := conf.setField(name, raw[name]); err != nil {
			return nil, err
		}
	}
	if err := conf.setSpecFields(stdin, raw["prevResult"]); err != nil {
		return nil, err
	}
	// libcni writes null for an empty list if the runtime passes a nil slice, as CRI-O does for a network without pods.
	if _, given := raw[fieldValidAttachments]; given && conf.validAttachments == nil {
		conf.validAttachments = []types.GCAttachment{}
	}
	return conf, nil
}

func (c *netConf) setField(name string, raw json.RawMessage) error {
	set, ours := ownFields[name]
	if !ours {
		if slices.Contains(specFields, name) || strings.Contains(name, "cni.dev/") {
			return nil
		}
		if successor := replacedFields[name]; successor != "" {
			return fault(types.ErrUnsupportedField, "field %q (value %s) was removed: %q replaces it", name, raw, successor)
		}
		return fault(types.ErrUnsupportedField, "unknown field %q (value %s): probelet's fields are %s",
			name, raw, strings.Join(slices.Sorted(maps.Keys(ownFields)), ", "))
	}
	var value *string // nil if the value is null
	if err := json.Unmarshal(raw, &value); err != nil || value == nil {
		return fault(types.ErrInvalidNetworkConfig, "%s is %s: must be a string", name, raw)
	}
	if err := set(c, *value); err != nil {
		return fault(types.ErrInvalidNetworkConfig, "%s is %q: %v", name, *value, err)
	}
	return nil
}

func (c *netConf) setSpecFields(stdin []byte, rawPrevResult json.RawMessage) error {
	var spec types.PluginConf
	if err := json.Unmarshal(stdin, &spec); err != nil {
		return fault(types.ErrInvalidNetworkConfig, "%v", err) // names the field
	}
	c.name = spec.Name
	c.validAttachments = spec.ValidAttachments
	if spec.RawPrevResult == nil {
		return nil
	}
	if err := c.setPrevResult(rawPrevResult, spec.CNIVersion); err != nil {
		return fault(types.ErrInvalidNetworkConfig, "prevResult: %v", err)
	}
	return nil
}

func (c *netConf) setPrevResult(raw json.RawMessage, confVersion string) error {
	raw, err := withVersion(raw, confVersion)
	if err != nil {
		return err
	}
	result, err := version.NewResult(confVersion, raw)
	if err != nil {
		return err
	}
	c.rawPrevResult = raw
	c.prevResult, err = current.NewResultFromResult(result)
	return err
}

// withVersion returns the result with a cniVersion, taken from the configuration if the result has none. Runtimes cannot parse
// a result without it, and it must match the configuration's (CNI spec, "ADD Success").
func withVersion(rawResult json.RawMessage, version string) (json.RawMessage, error) {
	var result struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(rawResult, &result); err != nil || result.CNIVersion != "" {
		return bytes.TrimSpace(rawResult), err
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(rawResult, &fields); err != nil {
		return nil, err
	}
	var err error
	if fields["cniVersion"], err = json.Marshal(version); err != nil {
		return nil, err
	}
	return json.Marshal(fields)
}

// parseConfForDel takes whatever is usable from a configuration, however broken, and falls back to defaults for the rest.
func parseConfForDel(stdin []byte) *netConf {
	var raw map[string]json.RawMessage
	_ = json.Unmarshal(stdin, &raw)
	conf := defaultConf()
	for name := range ownFields {
		_ = conf.setField(name, raw[name])
	}
	_ = json.Unmarshal(raw["name"], &conf.name)
	return conf
}
