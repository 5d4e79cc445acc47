// Browsers run no web worker on a page that was opened from a folder. This runs the worker of the search in a hidden
// frame there. The theme would load such a script from a server; see extra.polyfills in mkdocs.yml.
(() => {
  if (location.protocol !== "file:") return;

  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inside = frame.contentWindow;
      inside.postMessage = data => this.#emit("message", data);
      inside.importScripts = async (...urls) => {
        for (const each of urls) await load(inside.document, each);
      };
      const ready = load(inside.document, new URL(url, location.href).href);
      this.postMessage = data => {
        ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data: structuredClone(data) })));
      };
      this.terminate = () => frame.remove();
    }

    #emit(type, data) {
      const event = new MessageEvent(type, { data: structuredClone(data) });
      this.dispatchEvent(event);
      this[`on${type}`]?.(event);
    }
  };
  window.Worker = window.IFrameWorker;

  function load(target, src) {
    return new Promise((done, failed) => {
      const script = target.createElement("script");
      Object.assign(script, { src, async: false, onload: done, onerror: failed });
      target.head.appendChild(script);
    });
  }
})();
