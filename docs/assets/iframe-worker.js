// Browsers start no worker from a file:// page, and the search of the site runs in one. Here a hidden
// frame takes its place: the worker's script runs there, and messages go over as events. The name
// IFrameWorker is what the theme's search looks for to find its other scripts.
(() => {
  if (location.protocol !== "file:") return
  class IFrameWorker extends EventTarget {
    constructor(address) {
      super()
      this.onmessage = null
      this.early = [] // what was sent before the script was there
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = (this.inside = this.frame.contentWindow)
      inside.postMessage = data => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      inside.importScripts = (...addresses) =>
        addresses.reduce((before, next) => before.then(() => this.load(next)), Promise.resolve())
      this.load(new URL(address, document.baseURI).href).then(() => {
        for (const data of this.early.splice(0)) this.postMessage(data)
        this.early = null
      }, () => this.dispatchEvent(new Event("error")))
    }
    load(address) {
      return new Promise((done, failed) => {
        const script = this.inside.document.createElement("script")
        script.src = address
        script.onload = () => done()
        script.onerror = () => failed(new Error(address))
        this.inside.document.body.append(script)
      })
    }
    postMessage(data) {
      if (this.early) this.early.push(data)
      else this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }))
    }
    terminate() {
      this.frame.remove()
    }
  }
  window.IFrameWorker = IFrameWorker
  window.Worker = IFrameWorker
})()
