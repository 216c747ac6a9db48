package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

// wantFault fails the test unless err is a CNI error with the given code and all of the texts.
func wantFault(t *testing.T, err error, code uint, texts ...string) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) {
		t.Fatalf("error %v, want a CNI error with code %d", err, code)
	}
	if e.Code != code {
		t.Errorf("code %d (%v), want %d", e.Code, err, code)
	}
	for _, text := range texts {
		if !strings.Contains(e.Msg, text) {
			t.Errorf("error %q does not name %q", e.Msg, text)
		}
	}
}

func TestParseConfNamesTheProblem(t *testing.T) {
	tests := []struct {
		fields string
		code   uint
		texts  []string
	}{
		{`"hook": "native"`, types.ErrInvalidNetworkConfig, []string{"hook", `"native"`, `"tc"`, `"xdp"`}},
		{`"hook": ""`, types.ErrInvalidNetworkConfig, []string{"hook", `""`}},
		{`"hook": 3`, types.ErrInvalidNetworkConfig, []string{"hook", "3", "string"}},
		{`"onError": "panic"`, types.ErrInvalidNetworkConfig, []string{"onError", `"panic"`, `"ignore"`, `"fail"`}},
		{`"onError": null`, types.ErrInvalidNetworkConfig, []string{"onError", "null"}},
		{`"onError": true`, types.ErrInvalidNetworkConfig, []string{"onError", "true"}},
		{`"bpfDir": "sys/fs/bpf"`, types.ErrInvalidNetworkConfig, []string{"bpfDir", `"sys/fs/bpf"`, "absolute"}},
		{`"bpfDir": "/sys/fs/bpf/probelet.d"`, types.ErrInvalidNetworkConfig, []string{"bpfDir", `"/sys/fs/bpf/probelet.d"`, "dot"}},
		{`"bpfDir": {}`, types.ErrInvalidNetworkConfig, []string{"bpfDir", "{}"}},
		{`"stateDir": "./state"`, types.ErrInvalidNetworkConfig, []string{"stateDir", `"./state"`, "absolute"}},
		{`"stateDir": ["/run"]`, types.ErrInvalidNetworkConfig, []string{"stateDir", `["/run"]`}},
		{`"logFile": "probelet.log"`, types.ErrInvalidNetworkConfig, []string{"logFile", `"probelet.log"`, "absolute"}},
		{`"logFile": 1`, types.ErrInvalidNetworkConfig, []string{"logFile", "1"}},
		{`"onerror": "fail"`, types.ErrUnsupportedField, []string{`"onerror"`, `"fail"`, "onError"}},
		{`"mtu": 1500`, types.ErrUnsupportedField, []string{`"mtu"`, "1500"}},
		{`"xdpMode": "generic"`, types.ErrUnsupportedField, []string{`"xdpMode"`, `"generic"`, `"hook" replaces it`}},
		{`"dns": 7`, types.ErrInvalidNetworkConfig, []string{"dns"}},
		{`"prevResult": {"ips": 7}`, types.ErrInvalidNetworkConfig, []string{"prevResult", "ips"}},
		{`"prevResult": "none"`, types.ErrInvalidNetworkConfig, []string{"prevResult"}},
	}
	for _, test := range tests {
		t.Run(test.fields, func(t *testing.T) {
			_, err := parseConf(fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": "net", "type": "probelet", %s}`, test.fields))
			wantFault(t, err, test.code, test.texts...)
		})
	}
	_, err := parseConf([]byte("["))
	wantFault(t, err, types.ErrDecodingFailure, "JSON")
}

func TestParseConfRejectsStateDirOnBPFFS(t *testing.T) {
	dir := newWorld(t).bpfDir() + "-state"
	_, err := parseConf(fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": "net", "type": "probelet", "stateDir": %q}`, dir))
	wantFault(t, err, types.ErrInvalidNetworkConfig, "stateDir", dir, "BPF file system")
}

func TestParseConfDefaults(t *testing.T) {
	conf, err := parseConf([]byte(`{"cniVersion": "1.0.0", "name": "net", "type": "probelet"}`))
	if err != nil {
		t.Fatal(err)
	}
	if conf.name != "net" || conf.onError != onErrorIgnore || conf.bpfDir != datapath.DefaultDir ||
		conf.stateDir != attach.DefaultStateDir || conf.logFile != "" || conf.prevResult != nil || conf.hook != attach.HookTC {
		t.Errorf("%+v", conf)
	}
}

func TestParseConfTakesEveryField(t *testing.T) {
	conf, err := parseConf([]byte(`{
		"cniVersion": "1.1.0", "cniVersions": ["1.0.0", "1.1.0"], "name": "net", "type": "probelet",
		"capabilities": {"portMappings": true}, "ipam": {}, "dns": {}, "args": {"cni": {}}, "ipMasq": false,
		"disableCheck": false, "disableGC": false, "loadOnlyInlinedPlugins": false, "runtimeConfig": {},
		"cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0"}], "cni.dev/attachments": [], "x.cni.dev/y": 1,
		"hook": "xdp", "onError": "fail", "bpfDir": "/b/", "stateDir": "/s", "logFile": "/l",
		"prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.2.3/24"}]}
	}`))
	if err != nil {
		t.Fatal(err)
	}
	if conf.hook != attach.HookXDP || conf.onError != onErrorFail || conf.bpfDir != "/b" || conf.stateDir != "/s" || conf.logFile != "/l" {
		t.Errorf("%+v", conf)
	}
	if len(conf.validAttachments) != 1 || conf.validAttachments[0].ContainerID != "c" {
		t.Errorf("valid attachments %+v", conf.validAttachments)
	}
	if len(conf.prevResult.IPs) != 1 || !json.Valid(conf.rawPrevResult) {
		t.Errorf("prevResult %+v, %s", conf.prevResult, conf.rawPrevResult)
	}
}

func TestParseConfForDelTakesAnything(t *testing.T) {
	tests := []struct{ stdin, name, bpfDir, stateDir string }{
		{``, "", datapath.DefaultDir, attach.DefaultStateDir},
		{`]`, "", datapath.DefaultDir, attach.DefaultStateDir},
		{`{"name": "net", "type": "probelet"}`, "net", datapath.DefaultDir, attach.DefaultStateDir},
		{`{"name": "net", "bpfDir": "/b", "stateDir": "/s", "onError": 7, "what": {}, "prevResult": 1}`, "net", "/b", "/s"},
		{`{"name": "net", "xdpMode": "generic", "hook": "warp", "stateDir": "/s"}`, "net", datapath.DefaultDir, "/s"},
		{`{"name": "net", "bpfDir": "/sys/fs/bpf/probelet.d", "stateDir": "/s"}`, "net", datapath.DefaultDir, "/s"},
		{`{"name": 1, "bpfDir": "b", "stateDir": null}`, "", datapath.DefaultDir, attach.DefaultStateDir},
	}
	for _, test := range tests {
		conf := parseConfForDel([]byte(test.stdin))
		if conf.name != test.name || conf.bpfDir != test.bpfDir || conf.stateDir != test.stateDir {
			t.Errorf("%s: %+v", test.stdin, conf)
		}
	}
}
