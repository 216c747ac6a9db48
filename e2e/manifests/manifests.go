// Package manifests renders the Helm chart and reads Kubernetes objects, as strictly as the API server does.
package manifests

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	sigsyaml "sigs.k8s.io/yaml"
)

// Render is what "helm template NAME CHART --namespace NAMESPACE" prints, without the notes.
func Render(chartDir, name, namespace string, values map[string]any) (string, error) {
	chart, err := loader.Load(chartDir)
	if err != nil {
		return "", err
	}
	options := common.ReleaseOptions{Name: name, Namespace: namespace, Revision: 1, IsInstall: true}
	all, err := util.ToRenderValues(chart, values, options, common.DefaultCapabilities)
	if err != nil {
		return "", err
	}
	files, err := engine.Render(chart, all)
	if err != nil {
		return "", err
	}
	var text strings.Builder
	for _, file := range slices.Sorted(maps.Keys(files)) {
		if filepath.Ext(file) == ".yaml" && strings.TrimSpace(files[file]) != "" {
			fmt.Fprintf(&text, "---\n%s\n", strings.TrimSpace(files[file]))
		}
	}
	return text.String(), nil
}

// Decode reads YAML documents. A field that is not known, or is there twice, is an error. Objects of kinds that are not
// Kubernetes' own are unstructured.
func Decode(text string) ([]runtime.Object, error) {
	strict := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	reader := yaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(text)))
	defer reader.Close() //nolint:errcheck // read only
	var objects []runtime.Object
	buffer := make([]byte, 1<<20)
	for {
		n, err := reader.Read(buffer)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		document := bytes.TrimSpace(buffer[:n])
		if len(document) == 0 {
			continue
		}
		object, _, err := strict.Decode(document, nil, nil)
		if runtime.IsNotRegisteredError(err) {
			other := &unstructured.Unstructured{}
			err = sigsyaml.UnmarshalStrict(document, &other.Object)
			object = other
		}
		if err != nil {
			return nil, fmt.Errorf("%w in\n%s", err, document)
		}
		objects = append(objects, object)
	}
}
