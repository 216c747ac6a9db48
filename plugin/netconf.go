package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

const (
	// onErrorIgnore starts the pod without probelet, and says why.
	onErrorIgnore = "ignore"
	onErrorFail   = "fail"
)

// netConf is the plugin's part of a network configuration.
type netConf struct {
	name string

	onError  string
	bpfDir   string
	stateDir string
	logFile  string // empty: none

	prevResult *current.Result // nil: none
	// rawPrevResult is printed instead of prevResult, so that fields unknown to this build pass unchanged.
	rawPrevResult    json.RawMessage
	validAttachments []types.GCAttachment
}

func defaultConf() *netConf {
	return &netConf{onError: onErrorIgnore, bpfDir: datapath.DefaultDir, stateDir: attach.DefaultStateDir}
}

// ownFields are the fields of our own, all of them strings. A setter that returns an error has changed nothing.
var ownFields = map[string]func(c *netConf, value string) error{
	"xdpMode":  func(_ *netConf, value string) error { return checkXDPMode(value) },
	"onError":  setOnError,
	"bpfDir":   func(c *netConf, value string) error { return setPath(&c.bpfDir, value) },
	"stateDir": func(c *netConf, value string) error { return setPath(&c.stateDir, value) },
	"logFile":  func(c *netConf, value string) error { return setPath(&c.logFile, value) },
}

// specFields are those that the CNI specification or libcni define for a plugin's configuration or for the list around
// it; some runtimes copy the latter down. Those in the specification's name space, cni.dev/, come besides.
var specFields = []string{
	"cniVersion", "cniVersions", "name", "type", "capabilities", "ipam", "dns", "args", "ipMasq", "disableCheck",
	"disableGC", "loadOnlyInlinedPlugins", "runtimeConfig", "prevResult",
}

// checkXDPMode accepts what package attach can do; that is one mode for now.
func checkXDPMode(value string) error {
	switch value {
	case string(attach.XDPGeneric):
		return nil
	case "native":
		return fmt.Errorf("native XDP on a veth never sees packets that are redirected to the device, "+
			"so steered probes would be lost; use %q", attach.XDPGeneric)
	}
	return fmt.Errorf("must be %q", attach.XDPGeneric)
}

func setOnError(c *netConf, value string) error {
	if value != onErrorIgnore && value != onErrorFail {
		return fmt.Errorf("must be %q or %q", onErrorIgnore, onErrorFail)
	}
	c.onError = value
	return nil
}

func setPath(path *string, value string) error {
	if !filepath.IsAbs(value) {
		return errors.New("must be an absolute path")
	}
	*path = filepath.Clean(value)
	return nil
}

// parseConf reads a configuration. Its errors name the field and the value.
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
	return conf, nil
}

func (c *netConf) setField(name string, raw json.RawMessage) error {
	set, ours := ownFields[name]
	if !ours {
		if slices.Contains(specFields, name) || strings.Contains(name, "cni.dev/") {
			return nil
		}
		return fault(types.ErrUnsupportedField, "field %q, which is %s, is none of probelet's (%s)",
			name, raw, strings.Join(slices.Sorted(maps.Keys(ownFields)), ", "))
	}
	var value *string // nil for a null, which is no value either
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
	if err := version.ParsePrevResult(&spec); err != nil {
		return fault(types.ErrInvalidNetworkConfig, "prevResult: %v", err)
	}
	if spec.PrevResult == nil {
		return nil
	}
	result, err := current.NewResultFromResult(spec.PrevResult)
	if err != nil {
		return fault(types.ErrInvalidNetworkConfig, "prevResult: %v", err)
	}
	c.prevResult = result
	c.rawPrevResult = bytes.TrimSpace(rawPrevResult)
	return nil
}

// parseConfForDel takes from a configuration, in whatever state it is, what says where to look, and defaults otherwise.
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
